"""Shrinking a model that already has exits: the heads shrink with the features they read."""

import pytest
import torch
from torch import nn

import dyncompress as dc
from dyncompress.model_zoo import zoo as models
from dyncompress.passes.graph.cost import count_macs


@pytest.mark.parametrize("name", ["vgg-digits", "resnet-digits"])
def test_image_heads_shrink_exactly(name: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 1, 32, 32, dtype=torch.float64)
    gm = dc.InsertExits(3)(dc.capture(models.build(name).double().eval(), x)).gm
    axes = dc.infer_axes(gm)
    assert not axes.untyped
    keep = {axis.name: range(0, axis.size, 2) for axis in axes.prunable}
    with torch.no_grad():
        for ours, reference in zip(dc.shrink(gm, keep)(x), dc.mask(gm, keep)(x), strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in models.ZOO if models.ZOO[name].trained])
def test_a_shrunk_trunk_is_still_dynamic(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.rand(6, 1, 32, 32)
    gm = dc.InsertExits(1)(dc.capture(models.build(name), x)).gm
    dynamic = dc.DynamicModel(dc.prune(gm, macs=0.5)).eval()
    assert count_macs(dynamic.trunk) <= 0.5 * count_macs(gm)
    dynamic.policy = dc.ExitPolicy("max-softmax", (0.12,), (1.0,))
    dc.save(dynamic, tmp_path / "small.safetensors")
    for model in (dynamic, dc.load(tmp_path / "small.safetensors")):
        out, every = model.predict(x), model.all_logits(x)
        expected = torch.stack([every[k][i] for i, k in enumerate(out.exit_index.tolist())])
        torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-5)


def test_token_heads_have_no_exact_form_and_say_so() -> None:
    x = torch.rand(2, 1, 32, 32)
    gm = dc.InsertExits(1)(dc.capture(models.build("vit-digits"), x)).gm
    axes = dc.infer_axes(gm)
    width = next(a for a in axes.prunable if any(n.startswith("exits") for n in a.statistics))
    with pytest.raises(dc.RequestError, match="TokenHead"):
        dc.shrink(gm, {width.name: [0, 1]}, exact=True)
    assert isinstance(dc.shrink(gm, {width.name: [0, 1]}).get_submodule("exits.0").norm, nn.LayerNorm)
