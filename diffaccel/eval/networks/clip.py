"""CLIP on pictures and captions: score, CMMD's features, and the traps between weights and their network."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.eval.errors import DataError, MissingWeights
from diffaccel.eval.networks.clip_weights import OPENAI, filled, trained_as
from diffaccel.eval.networks.extractor import Extractor, exact_float32
from diffaccel.eval.networks.weights import find_weights, sha256_of
from diffaccel.zoo import path as zoo_path
from diffaccel.zoo import quiet_loading

CAPTIONS_AT_ONCE = 256
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_score(image_features: Tensor, text_features: Tensor) -> Tensor:
    """100 times the cosine of each picture and its caption: two (N, d) -> (N,) float64, -100 to 100.

    As in torchmetrics, MLPerf and most papers since 2022; Hessel et al. 2021, who named the score, put "A photo
    depicts " before the caption and take 2.5 max(cosine, 0). It means nothing without the network's name, and nothing
    is clamped here: torchmetrics clamps the mean at 0, some papers' programs each picture.

    Raises:
        DataError: if the shapes differ.
    """
    if image_features.shape != text_features.shape or image_features.ndim != 2:
        shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        raise DataError(f"CLIP score needs one caption for each picture, features (N, d) of both, not {shapes}")
    return 100 * F.cosine_similarity(image_features.double().cpu(), text_features.double().cpu(), dim=1)


def emoji_clip(device: str = "cpu") -> Extractor:
    """The small CLIP of the zoo (64 x 64 pictures, 128 features). Its numbers are no CLIP scores.

    Pictures that are no squares are cut to their centre, not squashed as by its processor.
    """
    with quiet_loading():
        return _transformers(zoo_path("emoji-clip"), "emoji-clip", (0.5,) * 3, (0.5,) * 3, device)


def transformers_clip(folder: str | os.PathLike[str], device: str = "cpu") -> Extractor:
    """A `CLIPModel` of transformers from a folder with `config.json`, `model.safetensors`, tokenizer and processor.

    The pictures are prepared as by OpenAI's program (protocol `clip`); of the processor, mean and deviation are taken.

    Raises:
        MissingWeights: if the folder lacks a file.
        DataError: if its processor asks for something else than shortest side, bicubic and centre crop.
    """
    folder = Path(folder)
    settings = _processor(folder)
    size = settings.get("size", {})
    plain = settings.get("resample", 3) == 3 and settings.get("rescale_factor", 1 / 255) == 1 / 255
    if "shortest_edge" not in (size if isinstance(size, dict) else {"shortest_edge": size}) or not plain:
        raise DataError(f"{folder}: its processor resizes in another way than CLIP's (shortest side, bicubic, crop)")
    mean, std = settings.get("image_mean", OPENAI_MEAN), settings.get("image_std", OPENAI_STD)
    return _transformers(folder, f"clip/{folder.resolve().name}", mean, std, device)


def _processor(folder: Path) -> dict[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
            return settings.get("image_processor", settings)
    raise MissingWeights(f"{folder} lacks preprocessor_config.json, which says how pictures are prepared")


def _transformers(folder: Path, name: str, mean: Sequence[float], std: Sequence[float], device: str) -> Extractor:
    from transformers import AutoTokenizer, CLIPModel

    file = folder / "model.safetensors"
    for needed in (file, folder / "config.json", folder / "tokenizer_config.json"):
        if not needed.is_file():
            raise MissingWeights(
                f"{folder} lacks {needed.name}; give a CLIPModel's folder with model.safetensors in it"
            )
    model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    model = model.eval().requires_grad_(False).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    length = model.config.text_config.max_position_embeddings

    def network(pixels: Tensor) -> dict[str, Tensor]:
        return {"features": _tensor(model.get_image_features(pixel_values=_normalised(pixels, mean, std)))}

    def encode(captions: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        # The text feature is read at the end token. torchmetrics cuts the tokens behind it, and long captions then
        # all get the same feature: that of their first token.
        if not (tokens.input_ids == tokenizer.eos_token_id).any(1).all():
            raise DataError(f"{folder}: its tokenizer leaves the end token out, where the text feature is read")
        return _tensor(model.get_text_features(**tokens.to(device)))

    def too_long(caption: str) -> bool:
        return len(tokenizer(caption, truncation=False, verbose=False).input_ids) > length

    vision = model.config.vision_config.image_size
    text = _text_side(encode, too_long, length)
    identity = sha256_of(file) if name == "emoji-clip" else _identity(file, mean, std)
    return Extractor(name, model.config.projection_dim, vision, "clip", identity, network, text, device)


def _identity(file: Path, mean: Sequence[float], std: Sequence[float]) -> str:
    """Hash of the weights and, where it is not OpenAI's, of the normalisation too: features hang on both."""
    digest = sha256_of(file)
    if (tuple(mean), tuple(std)) == (OPENAI_MEAN, OPENAI_STD):
        return digest
    return hashlib.sha256(f"{digest} {tuple(mean)} {tuple(std)}".encode()).hexdigest()


def _tensor(features: Any) -> Tensor:
    # transformers 5 wraps the projected features in the tower's output, 4 returns them bare
    return features if isinstance(features, Tensor) else features.pooler_output


def open_clip_extractor(
    model: str = "ViT-B-32-quickgelu",
    *,
    weights: str | os.PathLike[str] | None = None,
    protocol: Literal["clip", "cmmd"] = "clip",
    device: str = "cpu",
) -> Extractor:
    """A CLIP of open_clip from a local file; `model="ViT-L-14-336-quickgelu", protocol="cmmd"` is CMMD's.

    Which weights a file holds is told by its SHA-256 or, failing that, by an open_clip tag such as `openai` or
    `laion2b_s34b_b79k` in the names of file and folder. It decides two things that open_clip leaves open for a local
    file: the activation (OpenAI's, MetaCLIP's and some others are trained with QuickGELU, and open_clip 3 computes
    GELU for them unless the model's name says quickgelu) and the normalisation. A file that is not recognised is
    taken as the model's name says, with OpenAI's normalisation.

    Args:
        model: a name of open_clip's list, with two towers of its own and its own tokenizer.
        weights: `.safetensors`, or `.pt`, `.pth`, `.bin` with a state dict, or OpenAI's file as published; default:
            OpenAI's, see `find_weights`.
        protocol: how pictures are prepared.
        device: where to run.

    Raises:
        MissingWeights: if there is no such file.
        DataError: if the file does not fit the model, or was trained with another activation.
        ValueError: if the model is unknown or needs files from the hub.
    """
    config = _config(model)
    if weights is None:
        if model not in OPENAI:
            raise ValueError(f"give the weights of {model} as a file; only {', '.join(OPENAI)} are looked for")
        weights = find_weights(OPENAI[model])
    path = Path(weights)
    if not path.is_file():
        raise MissingWeights(f"there is no file {path} with the weights of {model}")
    tag = trained_as(model, path, config.get("quick_gelu", False))
    mean, std = tag.get("mean", OPENAI_MEAN), tag.get("std", OPENAI_STD)
    net = filled(config, path).eval().requires_grad_(False).to(device)

    import open_clip

    tokenizer: Any = open_clip.get_tokenizer(model)  # its own: keeps the end token of long captions
    length = tokenizer.context_length

    def network(pixels: Tensor) -> dict[str, Tensor]:
        return {"features": net.encode_image(_normalised(pixels, mean, std))}

    def encode(captions: Sequence[str]) -> Tensor:
        return net.encode_text(tokenizer(list(captions)).to(device))

    def too_long(caption: str) -> bool:
        return len(tokenizer.encode(caption)) + 2 > length  # start and end

    size = config["vision_cfg"]["image_size"]
    text = _text_side(encode, too_long, length)
    identity = _identity(path, mean, std)
    return Extractor(f"open_clip/{model}", config["embed_dim"], size, protocol, identity, network, text, device)


def _config(model: str) -> dict[str, Any]:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("open_clip_extractor needs open_clip; pip install 'diffaccel[eval]'") from error
    if model not in open_clip.list_models():
        raise ValueError(
            f"open_clip has no model {model!r}; open_clip.list_models() names them, such as {list(OPENAI)}"
        )
    config: Any = open_clip.get_model_config(model)
    elsewhere = config.get("custom_text") or {"hf_model_name", "hf_tokenizer_name"} & set(config["text_cfg"])
    if elsewhere or not isinstance(config["vision_cfg"]["image_size"], int):
        raise ValueError(f"{model} needs a text tower or tokenizer from the hub; only CLIP's own layout is read here")
    return config


def _normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[0, 255] -> what the network was trained on."""
    center, scale = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (mean, std))
    return (pixels / 255 - center) / scale


def _text_side(
    encode: Callable[[Sequence[str]], Tensor], too_long: Callable[[str], bool], length: int
) -> Callable[[Sequence[str]], Tensor]:
    @torch.inference_mode()
    def text(captions: Sequence[str]) -> Tensor:
        """Captions -> (N, d) float32 on the CPU; how many were cut, their end kept, is a warning."""
        if isinstance(captions, str) or not captions:
            raise DataError(f"captions must be a list with at least one text, not {captions!r}")
        cut = sum(map(too_long, captions))
        if cut:
            warnings.warn(
                f"{cut} of {len(captions)} captions are longer than {length} tokens and were cut", stacklevel=2
            )
        parts = [captions[i : i + CAPTIONS_AT_ONCE] for i in range(0, len(captions), CAPTIONS_AT_ONCE)]
        with exact_float32():
            return torch.cat([encode(part).float().cpu() for part in parts])

    return text
