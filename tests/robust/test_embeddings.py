"""Ascent on embeddings stays in its ball and raises the loss; adversarial training trains against it."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from polybit.core.plan import Plan
from polybit.core.runtime import PolybitError
from polybit.robust.embeddings import Adversarial, ascend, project
from polybit.robust.gradients import embedding_matrix
from tests.families import tiny_model


def batch():
    ids = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(1))
    learn = torch.zeros_like(ids).bool()
    learn[:, 8:] = True
    return {"ids_BT": ids, "mask_BT": torch.ones_like(learn), "learn_BT": learn}


def objective(forward, part, presets):
    total = 0.0
    for name in presets:
        logits = forward(part, name)
        learn = part["learn_BT"][:, 1:]
        total = total + cross_entropy(logits[:, :-1][learn], part["ids_BT"][:, 1:][learn])
    return total, {"nll": float(total.detach())}


def test_projection_is_per_token():
    delta = torch.randn(2, 5, 8)
    found = project(delta, 0.5)
    assert float(found.norm(dim=-1).max()) <= 0.5 + 1e-6
    small = delta * 0.01
    assert torch.allclose(project(small, 0.5), small)


def test_ascent_raises_the_loss_within_its_ball():
    model, rows = tiny_model("llama"), batch()
    free = ~rows["learn_BT"]
    loss = lambda: objective(lambda part, _: model(part["ids_BT"], use_cache=False).logits, rows, ("x",))[0]  # noqa: E731
    before = float(loss().detach())
    losses = []
    for iterations in (1, 6):
        delta = ascend(model, loss, free, radius=0.5, iterations=iterations)
        assert float(delta.norm(dim=-1).max()) <= 0.5 + 1e-5 and not delta[~free].any()
        from polybit.robust.gradients import nudged

        with torch.no_grad(), nudged(model, delta):
            losses.append(float(loss()))
    assert before < losses[0] and before < losses[1]
    assert all(p.grad is None for p in model.parameters())


def test_adversarial_training_lowers_the_attacked_loss():
    from polybit.nn.switch import use
    from polybit.train.latent import make_trainable

    model = make_trainable(tiny_model("llama"), {"w8": Plan.uniform("w8"), "w3": Plan.uniform("w3")}, group_size=0)

    def forward(part, name):
        use(model, name)
        return model(part["ids_BT"], attention_mask=part["mask_BT"].long(), use_cache=False).logits

    wrapped = Adversarial(objective, model, epsilon=0.2, iterations=2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    rows, seen = batch(), []
    for step in range(12):
        loss, logs = wrapped(forward, rows, (("w8", "w3")[step % 2],))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(logs[f"{('w8', 'w3')[step % 2]}/attacked"])
        assert logs["nll"] > 0
    assert sum(seen[-2:]) < 0.8 * sum(seen[:2])


def test_refusals():
    model = tiny_model("llama")
    for wrong in ({"epsilon": 0}, {"iterations": 0}, {"clean": 1.0}):
        with pytest.raises(PolybitError, match="not possible"):
            Adversarial(objective, model, **wrong)
    with pytest.raises(PolybitError, match="no gradient reaches"):
        ascend(model, lambda: torch.zeros(()), torch.ones(1, 2).bool(), radius=1.0)
    assert embedding_matrix(model).shape == (96, 72)
