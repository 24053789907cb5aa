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
# # 2. Bring your own model and data
#
# Nothing here has to be written for hpt_torch: a model is an ordinary `nn.Module`, data are tensors. What
# you would like to tune becomes an argument of the model's constructor.

# %%
import plotly.graph_objects as go
import torch
from torch import nn

import hpt_torch as hpt

# %% [markdown]
# ## Data
#
# Two spirals, one a class. `hpt.split` makes the three parts and, where asked, standardises with the mean
# and the deviation of the *train* rows only.

# %%
generator = torch.Generator().manual_seed(0)
turn = torch.rand(1200, generator=generator).sqrt() * 3 * torch.pi
label = (torch.arange(1200) % 2).long()
angle = turn + torch.pi * label
x = (
    torch.stack((turn * angle.cos(), turn * angle.sin()), dim=1)
    + torch.randn(1200, 2, generator=generator) * 0.5
)
data = hpt.split(x, label, standardise=True, name="spirals")
len(data.train), len(data.valid), len(data.holdout)

# %% [markdown]
# ## A model
#
# Every argument is a hyperparameter, its default is the default. `waves` maps the two coordinates to sines
# first, which is what a spiral asks for.


# %%
class Spiral(nn.Module):
    def __init__(self, width: int = 32, depth: int = 2, waves: int = 0, dropout: float = 0.0):
        super().__init__()
        if waves > width:
            raise hpt.InfeasibleError(f"waves must be at most width, got {waves} and {width}")
        self.waves = nn.Linear(2, waves) if waves else None
        sizes = [2 + 2 * waves, *[width] * depth]
        layers = []
        for before, after in zip(sizes, sizes[1:]):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 2))

    def forward(self, x):
        if self.waves is not None:
            phase = self.waves(x)
            x = torch.cat((x, phase.sin(), phase.cos()), dim=1)
        return self.layers(x)


# %%
task = hpt.Classification(Spiral, data, metrics=["accuracy", "f1"])
space = {
    "lr": hpt.Float(1e-3, 1e-1),
    "width": hpt.Choice([8, 16, 32, 64]),
    "depth": hpt.Int(1, 3),
    "waves": hpt.Choice([0, 8, 16]),
    "dropout": hpt.Float(0.0, 0.3),
}
result = hpt.tune(task, space, trials=30, epochs=30, hparams={"batch_size": 64}, run_dir="runs/spirals")
result

# %% [markdown]
# A combination that allows no model (`waves` above `width`) raises `InfeasibleError`: that trial ends
# INFEASIBLE with the reason, the others go on, and the sampler learns from it.

# %%
for trial in result.trials:
    if trial.state != hpt.TrialState.COMPLETE:
        print(trial.number, trial.state, trial.reason)

# %%
result.plot.slice("width", "waves", "depth")

# %% [markdown]
# What did it learn? The best model, over the whole plane:

# %%
model = result.best_model()
axis = torch.linspace(-2.2, 2.2, 120)
grid = torch.cartesian_prod(axis, axis)
with torch.no_grad():
    surface = model(grid).softmax(1)[:, 1].reshape(120, 120).T
rows = data.valid.slice(0, len(data.valid))
figure = go.Figure(go.Heatmap(x=axis, y=axis, z=surface, colorscale="RdBu", opacity=0.6))
figure.add_scatter(
    x=rows["inputs"][:, 0],
    y=rows["inputs"][:, 1],
    mode="markers",
    marker={"color": rows["targets"], "colorscale": "RdBu", "line": {"width": 1}},
)
figure.update_layout(title="two spirals, the best model", width=560, height=520, template="plotly_white")

# %% [markdown]
# ## Any loss, any metric: your own Task
#
# `Classification` and `Regression` are tasks that are ready. Yours says what the data are, how a model is
# built, what is minimised, and what is measured; all written for **one model and one batch**. Here: the 90
# % quantile of the disease progression in scikit-learn's diabetes data, with the pinball loss.

# %%
from hpt_torch.data import diabetes
from hpt_torch.hparams import HParamSpec


class Quantile(hpt.Task):
    name = "quantile"
    objective = hpt.Objective(metric="valid/pinball", direction="minimize")
    metric_names = ("pinball", "covered")
    share = 0.9

    def __init__(self):
        self._data = diabetes()

    def data(self):
        return self._data

    def hparam_specs(self):
        own = HParamSpec(name="width", type="int", default=16, low=1, doc="units of the hidden layer")
        return {**super().hparam_specs(), "width": own}

    def build_model(self, hparams):
        return nn.Sequential(nn.Linear(10, hparams["width"]), nn.ReLU(), nn.Linear(hparams["width"], 1))

    def _error(self, model, batch):
        return batch["targets"] / 100 - model(batch["inputs"]).squeeze(-1)

    def loss(self, model, batch, hparams):
        error = self._error(model, batch)
        return torch.maximum(self.share * error, (self.share - 1) * error).mean()

    def metrics(self, model, batch):  # sums over the batch ...
        error = self._error(model, batch)
        pinball = torch.maximum(self.share * error, (self.share - 1) * error)
        return {"pinball": pinball.sum(), "covered": (error <= 0).sum(), "rows": torch.tensor(len(error))}

    def finalize(self, sums):  # ... and what they mean
        return {name: float(sums[name] / sums["rows"]) for name in ("pinball", "covered")}


quantile = hpt.tune(
    Quantile(),
    {"lr": hpt.Float(1e-4, 1e-1), "width": hpt.Choice([4, 16, 64]), "weight_decay": hpt.Float(1e-6, 1e-1)},
    trials=20,
    epochs=20,
    run_dir="runs/quantile",
)
quantile

# %% [markdown]
# "Covered" is the share of patients whose value lies below the predicted quantile: near 0.9 if the model is
# right. On the rows that nobody has looked at:

# %%
quantile.holdout
