"""Models of the zoo have the traits they state: a battery on a model that cannot fail is void."""

from __future__ import annotations

import pytest
import torch

from tests.zoo import FAMILIES, Family, sample_of

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def run(family: Family, model: torch.nn.Module, **ask: int) -> torch.Tensor:
    args, kwargs = family.inputs(model, **ask)
    return sample_of(model(*args, **kwargs))


@families
def test_backward_gives_every_parameter_a_gradient_but_the_unread(family: Family) -> None:
    model, args, kwargs = family.make(batch=2)
    sample_of(model(*args, **kwargs)).square().sum().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == family.unread


@families
def test_same_seed_gives_same_model_and_same_inputs(family: Family) -> None:
    one = run(family, family.build())
    torch.randn(1)
    two = run(family, family.build())
    assert torch.equal(one, two)
    assert not torch.equal(one, run(family, family.build(seed=1)))
    assert not torch.equal(one, run(family, family.build(), seed=1))
    assert one.std() > 0.01


@families
def test_batches_sizes_and_timesteps_are_those_the_family_states(family: Family) -> None:
    model = family.build()
    small = run(family, model, batch=1)
    assert run(family, model, batch=3).shape == (3, *small.shape[1:])
    if family.second_size is not None:
        assert run(family, model, size=family.second_size).numel() == 4 * small.numel()
    call = family.inputs(model)
    args, kwargs = family.at(call, 3 if family.int_timestep else torch.tensor([3]))
    assert not torch.equal(sample_of(model(*args, **kwargs)), small)
    if family.return_dict:
        args, kwargs = call
        (plain,) = model(*args, **kwargs, return_dict=False)
        assert torch.equal(plain, small)


@families
def test_checkpointing_gives_the_same_gradients(family: Family) -> None:
    model = family.build().train()
    read = [param for name, param in model.named_parameters() if name not in family.unread]

    def gradients() -> tuple[torch.Tensor, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return torch.autograd.grad(run(family, model).sum(), read)

    plain = gradients()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(), plain)


@families
def test_outputs_in_train_are_random_where_the_family_says_so(family: Family) -> None:
    model = family.build().train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        outputs = [run(family, model, batch=8) for _ in range(8)]
    assert family.random_in_train == any(not torch.equal(outputs[0], out) for out in outputs)


@families
def test_models_are_small_and_hold_no_zero_parameter(family: Family) -> None:
    params = list(family.build().parameters())
    assert sum(param.numel() for param in params) < 200_000
    assert all(param.any() for param in params)
