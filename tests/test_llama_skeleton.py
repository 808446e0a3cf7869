"""Converted models made from specs alone."""

from __future__ import annotations

import pytest
import torch
from llama_cases import FAMILIES, ids_of, make_model, through_cache

from int8_ops.llama import LatentAttention
from int8_ops.llama.skeleton import sharing_copy, with_random_factors
from int8_ops.llama.spec import LayerSpec, Slice

pytestmark = pytest.mark.usefixtures("one_thread")

INT8 = LayerSpec((Slice(8, 16),), (Slice(8, 24),))
MIXED = LayerSpec((Slice(8, 8), Slice(4, 8)), (Slice(8, 8), Slice(4, 8)), groups=2)
FLOATS = LayerSpec((Slice(16, 16),), (Slice(16, 16),))


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("spec", [INT8, MIXED, FLOATS])
@torch.no_grad()
def test_random_factors_work_and_leave_the_model_as_it_was(family, spec):
    model, ids = make_model(family), ids_of(2, 20)
    before = model(ids, use_cache=False).logits
    made = with_random_factors(model, [spec] * 3)
    logits = made(ids, use_cache=False).logits
    assert torch.isfinite(logits).all()
    assert float(logits.std()) > 0.1
    cached = through_cache(made, ids, 7)
    if spec is FLOATS:
        assert torch.allclose(cached, logits, atol=1e-4)
    # Sums in another order move some latents to the next integer.
    assert float((cached - logits).abs().mean()) < 0.02 * float(logits.std())
    assert torch.equal(with_random_factors(model, [spec] * 3)(ids).logits, made(ids).logits)
    assert torch.equal(model(ids, use_cache=False).logits, before)
    assert not any(isinstance(module, LatentAttention) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    own = {id(tensor) for tensor in model.parameters()}
    new = {name for name, tensor in made.named_parameters() if id(tensor) not in own}
    assert all(".k_proj." in name or ".v_proj." in name for name in new)


def test_a_sharing_copy_can_lose_layers():
    model = make_model()
    shorter = sharing_copy(model)
    shorter.model.layers = shorter.model.layers[:1]
    shorter.config.num_hidden_layers = 1
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert shorter.lm_head.weight is model.lm_head.weight


@pytest.mark.parametrize(
    ("specs", "told"),
    [
        ([INT8] * 2, "specs of 3 layers, as the model has, got 2"),
        ([LayerSpec(INT8.k, INT8.v, groups=3)] * 3, "divide the 4 KV heads of layer 0, got 3"),
    ],
)
def test_specs_that_do_not_fit_are_refused(specs, told):
    with pytest.raises(ValueError, match=told):
        with_random_factors(make_model(), specs)
