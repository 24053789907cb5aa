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
# # 4. How fused training works, and how fast it is
#
# A small model keeps a processor busy for microseconds, and PyTorch spends more time deciding what to do
# than doing it. Sixteen trials of one architecture do the same thing sixteen times with other numbers. So
# hpt_torch stacks them and does it once.

# %%
import plotly.graph_objects as go
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

import hpt_torch as hpt
from hpt_torch.data import digits
from hpt_torch.models import MLP

torch.set_num_threads(1)  # both ways get one thread, so that they are compared by what they do

# %% [markdown]
# ## The idea in fifteen lines
#
# P models of one shape: each weight gets a leading axis P. `vmap` maps the step of **one** model over that
# axis. A hyperparameter that may differ, here the learning rate, is a tensor of shape (P,).

# %%
P = 16
models = [nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)) for _ in range(P)]
params, buffers = stack_module_state(models)
{name: tuple(tensor.shape) for name, tensor in params.items()}


# %%
def loss(params, inputs, targets):  # written for one model
    return nn.functional.cross_entropy(functional_call(models[0], params, (inputs,)), targets)


step = vmap(grad_and_value(loss), in_dims=(0, None, None))  # ... and mapped over P of them
lr_P = torch.logspace(-3, 0, P)
rows = digits().train.slice(0, 64)
for _ in range(20):
    grads, losses_P = step(params, rows["inputs"], rows["targets"])
    for name, grad in grads.items():
        params[name] = params[name].detach() - lr_P.view(P, *[1] * (grad.dim() - 1)) * grad
losses_P.detach()

# %% [markdown]
# The sixteen learning rates gave sixteen losses, from one program. Two more steps make it fast: the mapped
# step is recorded once as a flat list of kernels and replayed, without autograd's bookkeeping; and members
# that ended are left out. What cannot be mapped (other architectures, other optimizers, other batch sizes)
# is another group. `hpt validate RECIPE` says which hyperparameters are *dynamic* (one value a member) and
# which *static* (one group each).
#
# ## How fast
#
# The same trials, one after another (`engine="loop"`) and together (`engine="fused"`), in one process:

# %%
task = hpt.Classification(MLP, digits())
space = {"lr": hpt.Float(1e-4, 1e-1), "dropout": hpt.Float(0.0, 0.5), "weight_decay": hpt.Float(1e-6, 1e-2)}


def measure(engine, trials, width=32):
    result = hpt.tune(
        task,
        space,
        hparams={"hidden_sizes": [width], "batch_size": 32},
        trials=trials,
        epochs=10,
        sampler="random",
        engine=engine,
        executor="inline",
        progress=False,
        tensorboard=False,
        run_dir=f"runs/fused/{engine}-{trials}-{width}",
    )
    return sum(report.seconds for trial in result.trials for report in trial.reports), result


seconds = {}
for trials in (2, 8, 32):
    for engine in ("loop", "fused"):
        seconds[engine, trials], _ = measure(engine, trials)
        print(f"{engine:5s} {trials:2d} trials: {seconds[engine, trials]:.2f} s")

# %%
counts = [2, 8, 32]
figure = go.Figure(
    go.Bar(x=[str(n) for n in counts], y=[seconds["loop", n] / seconds["fused", n] for n in counts])
)
figure.update_layout(
    title="times faster together than one by one",
    xaxis_title="trials in the group",
    yaxis_title="speed-up",
    template="plotly_white",
)

# %% [markdown]
# The more members, the more is shared. The wider the model, the less there is to gain: then the arithmetic
# itself takes the time, and it is the same for both.

# %%
for width in (32, 256):
    one, together = measure("loop", 8, width)[0], measure("fused", 8, width)[0]
    print(f"width {width}: {one / together:.1f} x")

# %% [markdown]
# ## The same results
#
# A member's result does not depend on its company: the same bits in a group of 2 or of 32. And against the
# loop it agrees up to rounding.

# %%
_, few = measure("fused", 8)
_, many = measure("fused", 32)
same = [a.weights_sha256 == b.weights_sha256 for a, b in zip(few.trials, many.trials)]
print(f"{sum(same)} of {len(same)} trials have the same bits in a group of 8 and of 32")
_, loop = measure("loop", 8)
gaps = [abs(a.metrics["valid/loss"] - b.metrics["valid/loss"]) for a, b in zip(few.trials, loop.trials)]
print(f"largest difference to the loop's valid loss: {max(gaps):.2g}")
assert all(same)

# %% [markdown]
# You need not choose: `engine="auto"` groups trials by signature, and lets convolutions and LSTMs, which
# are faster one by one on a CPU, go one by one. `sh scripts/bench grid` compares whole searches with
# Optuna, Ray Tune and skorch.
