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
# # 3. Population Based Training and its schedule
#
# A learning rate that is good at the start is often too high at the end. **Population Based Training**
# (Jaderberg et al. 2017) searches *schedules* while it trains: a population of models trains side by side;
# every few epochs the worst become copies of better ones, weights and all, and go on with slightly changed
# hyperparameters.

# %%
from pathlib import Path

import hpt_torch as hpt
from hpt_torch.data import digits
from hpt_torch.models import MLP

task = hpt.Classification(MLP, digits())
space = {
    "lr": hpt.Float(1e-4, 1e-1),
    "dropout": hpt.Float(0.0, 0.5),
    "label_smoothing": hpt.Float(0.0, 0.2),
}
fixed = {"hidden_sizes": [64, 64], "batch_norm": True}

# %% [markdown]
# Only what a half-trained model can go on with may be searched: learning rates, dropout, penalties, the
# batch size. The number of layers cannot change on the way, and is refused by name:

# %%
try:
    hpt.tune(task, {"hidden_sizes": hpt.Choice([[32], [64]])}, trials=4, scheduler={"kind": "pbt"})
except hpt.RecipeError as error:
    print(error)

# %% [markdown]
# `trials` is the size of the population. All sixteen have one architecture, so they train as one program.

# %%
result = hpt.tune(
    task,
    space,
    hparams=fixed,
    trials=16,
    epochs=20,
    scheduler={"kind": "pbt", "interval_epochs": 2, "quantile": 0.25},
    run_dir="runs/pbt",
)
result

# %% [markdown]
# ## The schedule
#
# The bold line is the way to the best weights: the hyperparameters of whoever trained them, back to the
# first epoch. The faint lines are all members.

# %%
result.plot.schedule("lr")

# %%
result.plot.schedule("dropout")

# %%
result.plot.curves()

# %% [markdown]
# Who copied whom? Each member has *phases*; a phase with a source began as a copy.

# %%
for trial in result.trials[:6]:
    copies = [
        f"of {p.source} after epoch {p.epoch}" for p in trial.phases if p.source not in (None, trial.number)
    ]
    print(f"member {trial.number:2d}: {', '.join(copies) or 'was never replaced'}")

# %% [markdown]
# The schedule can be taken away: `best/schedule.csv` has a row an epoch, and `best/schedule.toml` is a
# recipe that trains one model on it from scratch.

# %%
print(Path("runs/pbt/best/schedule.csv").read_text())

# %% [markdown]
# ## Was it the schedule, or luck?
#
# The best of sixteen is flattered by the choice. `replay` trains one model alone on that schedule, with
# other seeds, and compares.

# %%
replay = result.replay(seeds=3)
print(replay.verdict)

# %% [markdown]
# And against random search with the same compute, sixteen constant settings for as many epochs:

# %%
random = hpt.tune(
    task, space, hparams=fixed, trials=16, epochs=20, sampler="random", run_dir="runs/pbt-against-random"
)
for name, run in (("pbt", result), ("random search", random)):
    score = run.objective.score(run.best)
    print(f"{name:14s} valid {score:.4f}   hold-out {run.holdout['holdout/accuracy']:.4f}")

# %% [markdown]
# One seed on a small data set says little: a difference of 0.005 here is two images.
# `scheduler={"baseline": True, …}` trains these comparisons as part of the run, and the README has means
# over five seeds.
