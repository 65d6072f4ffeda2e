import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from diffaccel.eval.errors import DataError, MissingWeights
from diffaccel.eval.networks.dinov2 import dinov2
from diffaccel.eval.networks.weights import sha256_of
from tests.eval.offline import _no_network  # noqa: F401


def saved(folder, image_size: int = 518) -> Dinov2Model:
    """A small network, with position embeddings that matter."""
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=image_size, patch_size=14
    )
    torch.manual_seed(0)
    net = Dinov2Model(config).eval()
    torch.nn.init.normal_(net.embeddings.position_embeddings, std=1.0)
    net.save_pretrained(folder)
    return net


def prepared(picture: torch.Tensor) -> torch.Tensor:
    image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(224, 224), (64, 64), (100, 300)]
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def test_class_token_of_a_network_made_for_224(tmp_path):
    net = saved(tmp_path / "net", image_size=224)
    ours = dinov2(tmp_path / "net")
    assert (ours.name, ours.dim, ours.size, ours.protocol) == ("dinov2/net", 32, 224, "dinov2")
    assert ours.weights == sha256_of(tmp_path / "net" / "model.safetensors")
    with torch.no_grad():
        theirs = net(torch.stack([prepared(picture) for picture in pictures()])).last_hidden_state[:, 0]
    assert (ours(pictures())["features"] - theirs).abs().max() < 1e-4


def test_positions_are_brought_to_224_as_metas_program_does(tmp_path):
    net = saved(tmp_path)
    table = net.embeddings.position_embeddings.detach()
    patches = table.shape[1] - 1
    side = math.sqrt(patches)
    # vision_transformer.py of facebookresearch/dinov2: w0 + 0.1, scale factor (w0 / sqrt(N), h0 / sqrt(N))
    grid = table[:, 1:].reshape(1, int(side), int(side), -1).permute(0, 3, 1, 2)
    placed = F.interpolate(grid, scale_factor=(16.1 / side, 16.1 / side), mode="bicubic")
    placed = placed.permute(0, 2, 3, 1).reshape(1, 256, -1)
    net.embeddings.position_embeddings = torch.nn.Parameter(torch.cat([table[:, :1], placed], dim=1))
    pixels = torch.stack([prepared(picture) for picture in pictures()])
    with torch.no_grad():
        metas = net(pixels).last_hidden_state[:, 0]
        net.embeddings.position_embeddings = torch.nn.Parameter(table)
        transformers = net(pixels).last_hidden_state[:, 0]
    ours = dinov2(tmp_path)(pictures())["features"]
    assert (ours - metas).abs().max() < 1e-5
    assert (ours - transformers).abs().max() > 3e-4


def test_bad_folders_get_a_sentence(tmp_path):
    with pytest.raises(MissingWeights, match=r"lacks config\.json; .*dinov2-large"):
        dinov2(tmp_path)
    saved(tmp_path, image_size=224)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "dinov2_with_registers"}))
    with pytest.raises(DataError, match="'dinov2_with_registers'"):
        dinov2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingWeights, match=r"model\.safetensors"):
        dinov2(tmp_path)
