# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. A first tuning in ten minutes
#
# You have a model and data, and you want to know with which hyperparameters it does best, and how good it
# is then, honestly. Here the model is a small MLP and the data are scikit-learn's digits: 1,797 images of 8
# x 8 pixels, ten classes.
#
# The pictures need plotly: `pip install "hpt-torch[notebooks]"`.

# %%
import torch

import hpt_torch as hpt
from hpt_torch.data import digits
from hpt_torch.models import MLP

# %% [markdown]
# ## A task, a space, a budget
#
# A **task** is a model factory and data. The data come in three parts: *train* rows make the weights,
# *valid* rows choose between trials, and *hold-out* rows are read once, at the very end, so that the last
# figure is one that no decision has seen.

# %%
data = digits()
task = hpt.Classification(MLP, data)
{"train": len(data.train), "valid": len(data.valid), "hold-out": len(data.holdout)}

# %% [markdown]
# A **space** says what may vary. `lr` and `weight_decay` are searched on a log scale by themselves: between
# 0.0001 and 0.1 there are three factors of ten, and each gets as many trials. A `default` is what you would
# have used; trial 0 tries it, so that you see what the search was worth.

# %%
space = {
    "lr": hpt.Float(1e-4, 1e-1, default=1e-3),
    "dropout": hpt.Float(0.0, 0.6, default=0.0),
    "weight_decay": hpt.Float(1e-6, 1e-2, default=1e-6),
    "hidden_sizes": hpt.Choice([[32], [64], [64, 64]], default=[64]),
}

# %% [markdown]
# The **budget** is a number of trials, or a time (`timeout="30m"`), or both. A typo in a name, a value that
# cannot be, a hyperparameter that this model does not have: all are refused together, before anything is
# trained.

# %%
try:
    hpt.tune(task, {"learning_rate": hpt.Float(1e-4, 1e-1), "dropout": hpt.Float(0.0, 1.5)}, trials=30)
except hpt.RecipeError as error:
    print(error)

# %%
result = hpt.tune(task, space, trials=40, epochs=15, run_dir="runs/first-tuning")
result

# %% [markdown]
# ## What came of it
#
# The score on valid rows belongs to the best of forty trials, and the best of many is always a little
# lucky. The hold-out figure is not: nobody chose by it.

# %%
result.best

# %%
result.holdout

# %%
result.plot.progress()

# %% [markdown]
# Which hyperparameter mattered? In a slice each dot is a trial: where the upper edge of the cloud bends,
# the hyperparameter matters; where it is level, any value does.

# %%
result.plot.slice()

# %%
result.plot.importance()

# %% [markdown]
# ## The model
#
# The weights of the best trial were kept. `best_model()` gives them back in the model, ready to use; they
# also lie in `runs/first-tuning/best/` as a safetensors file, with the hyperparameters beside them.

# %%
model = result.best_model()
batch = data.holdout.slice(0, 8)
with torch.no_grad():
    predicted = model(batch["inputs"]).argmax(1)
print("predicted", predicted.tolist())
print("is       ", batch["targets"].tolist())

# %% [markdown]
# ## Run it again
#
# The same call goes on where the run was: this one was finished, so it is back at once. Kill it half-way,
# even with `kill -9`, and the same call ends with the same result, bit for bit.

# %%
again = hpt.tune(task, space, trials=40, epochs=15, run_dir="runs/first-tuning")
assert again.best.weights_sha256 == result.best.weights_sha256

# %% [markdown]
# More trials? The hold-out rows were read already. Searching on and reading them again makes that figure a
# little less honest, so you are asked to say that you know:

# %%
try:
    hpt.tune(task, space, trials=60, epochs=15, run_dir="runs/first-tuning")
except hpt.RunError as error:
    print(error)

# %% [markdown]
# ## Where to look next
#
# * `runs/first-tuning/report.html`: everything on one page, also while it runs (notebook 5 reads one)
# * `tensorboard --logdir runs`: every trial's curves, and the HParams tab
# * `hpt dashboard runs/first-tuning`: Optuna's dashboard
# * the next notebook: your own model and your own data
