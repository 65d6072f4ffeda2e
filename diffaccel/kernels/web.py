"""The page of `diffaccel edit-demo`: widgets of Gradio around a `Workbench`, on this machine alone."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from diffaccel.kernels.config import SparseEditConfig
from diffaccel.kernels.workbench import Workbench, load

CANVAS = 512  # pixels of the side that is painted on; small pictures are enlarged
BRUSH = "#ff3b6b"
HEAD = """# Edit a part of a picture, recompute only that part
`{model}` on **{device}**, {size} x {size} pixels, {steps} steps. Each edit is made twice and timed here: *dense* runs
the whole network, as usual; *sparse* runs it only around what you painted."""
SMALL = """**The model learned {own} x {own} pixels: at {size} x {size} it draws patterns rather than things. The times
are real.**"""
WAITING = "*Generate a picture, paint over a part of it and click Edit: the two results and their times appear here.*"
REFERENCES = [("record: keep the features of every step", "record"), ("self: run dense every 5 steps", "self")]
EXACTNESS = [
    ("fast: the margin as given", "fast"),
    ("bounded: grow it until a probe's error is at most 5 %", "bounded"),
    ("strict: dense", "strict"),
]


def serve(model: str = "emoji-sd", *, port: int = 7860, steps: int = 10, size: int | None = None) -> None:
    """Serve the page on 127.0.0.1 until Ctrl+C.

    Args:
        model: see `workbench.load`.
        port: of this machine.
        steps: of a picture.
        size: side of a picture; see `Workbench`.

    Raises:
        ImportError: without Gradio.
        OSError: if the port is taken.
    """
    gradio()  # before a model is loaded
    bench = Workbench(load(model), steps=steps, size=size)
    page = build(bench, model, steps)
    try:
        _, url, _ = launch(page, port)
    except OSError:
        raise OSError(f"port {port} of this machine is taken; give another one, such as --port {port + 1}") from None
    print(f"Open {url} in a browser of this machine; Ctrl+C ends it.", flush=True)
    page.block_thread()


def gradio() -> Any:
    """The module, told to keep to itself.

    Raises:
        ImportError: without it.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    try:
        return importlib.import_module("gradio")
    except ImportError:
        raise ImportError("edit-demo needs gradio; pip install 'diffaccel[demo]'") from None


def launch(page: Any, port: int) -> Any:
    """Start serving, for browsers of this machine only; returns app, address and None."""
    gr = gradio()
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    css = "#table :is(td, th):not(:first-child) { white-space: nowrap }"
    local = {"server_name": "127.0.0.1", "server_port": port, "share": False, "ssr_mode": False}
    return page.launch(
        **local, theme=theme, css=css, footer_links=[], quiet=True, prevent_thread_lock=True, max_file_size="64mb"
    )


def build(bench: Workbench, model: str, steps: int) -> Any:
    """The page, as `gradio.Blocks`."""
    gr = gradio()
    head = HEAD.format(model=model, device=bench.device, size=bench.size, steps=steps)
    with gr.Blocks(title="diffaccel edit-demo", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(head)
        if bench.size > bench.own_size:
            gr.Markdown(SMALL.format(own=bench.own_size, size=bench.size))
        with gr.Row():
            with gr.Column(scale=5, min_width=CANVAS + 90):
                widgets = _controls(gr, bench)
            with gr.Column(scale=6):
                results = _results(gr)
        _wire(gr, page, bench, widgets, results)
    return page


def _controls(gr: Any, bench: Workbench) -> dict[str, Any]:
    made: dict[str, Any] = {}
    gr.Markdown("### 1. Get a picture")
    made["shows"] = gr.Textbox("red heart", label="What the picture shows", elem_id="shows")
    with gr.Row():
        made["generate"] = gr.Button("Generate", variant="primary", elem_id="generate")
        made["upload"] = gr.UploadButton("Upload a picture instead", file_types=["image"], elem_id="upload")
    gr.Markdown("### 2. Paint over what should change")
    made["canvas"] = gr.ImageEditor(
        show_label=False,
        type="pil",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=CANVAS // 12, colors=[(BRUSH, 0.6)], color_mode="fixed"),
        buttons=[],
        canvas_size=(CANVAS, CANVAS),
        fixed_canvas=True,
        height=CANVAS + 90,
        elem_id="canvas",
    )
    gr.Markdown("### 3. Say what should be there")
    hint = "leave empty to keep the words"
    made["words"] = gr.Textbox(label="What the picture shows after the edit", placeholder=hint, elem_id="words")
    with gr.Row():
        made["edit"] = gr.Button("Edit", variant="primary", elem_id="edit")
        made["undo"] = gr.Button("Undo", elem_id="undo")
    what = "share of the steps that are made anew: 1 forgets what was there, 0.5 keeps its shapes and colours"
    made["strength"] = gr.Slider(0.1, 1, 1, step=0.05, label="Strength", info=what)
    with gr.Accordion("Options", open=False):
        made["margin"] = gr.Slider(0, 16, 4, step=1, label="Margin", info="latent pixels recomputed around the mask")
        made["exactness"] = gr.Radio(EXACTNESS, value="fast", label="Exactness")
        info = "where features outside of the mask come from; for the next picture"
        made["reference"] = gr.Radio(REFERENCES, value="record", label="Reference", info=info)
        made["fresh"] = gr.Checkbox(
            True, label="New noise in the mask", info="off: as in the picture, shapes stay near"
        )
        made["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, info="of the picture, and of new noise")
    return made


def _results(gr: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    gr.Markdown("### Dense and sparse, side by side")
    made["verdict"] = gr.Markdown(WAITING, elem_id="verdict")
    with gr.Row():
        made["dense"] = gr.Image(label="Dense", interactive=False, buttons=[], elem_id="dense")
        made["sparse"] = gr.Image(label="Sparse (kept)", interactive=False, buttons=[], elem_id="sparse")
    made["table"] = gr.Markdown("", elem_id="table")
    label = "Painted (red) and recomputed (blue frame)"
    made["recomputed"] = gr.Image(label=label, interactive=False, buttons=[], height=300, elem_id="recomputed")
    return made


def _wire(gr: Any, page: Any, bench: Workbench, widgets: dict[str, Any], results: dict[str, Any]) -> None:
    """What the buttons do. One thing at a time: there is one picture."""
    shown = [results[name] for name in ("verdict", "dense", "sparse", "table", "recomputed")]
    everything = [widgets["canvas"], *shown]
    empty = (WAITING, None, None, "", None)
    alone = {"concurrency_limit": 1, "concurrency_id": "bench", "api_visibility": "private"}
    progress = gr.Progress()
    count = itertools.count(1)  # of edits, so that new noise is new each time

    # Gradio finds the progress bar by its place and default.
    def generate(shows: str, seed: Any, margin: Any, exactness: Any, reference: Any, bar: Any = progress) -> Any:
        options = config(margin, exactness, reference)
        return canvas(bench.generate(shows, int(seed or 0), options, _tell(bar))), *empty

    def upload(
        path: Any, shows: str, seed: Any, margin: Any, exactness: Any, reference: Any, bar: Any = progress
    ) -> Any:
        options = config(margin, exactness, reference)
        return canvas(bench.upload(path, shows, int(seed or 0), options, _tell(bar))), *empty

    def edit(
        value: Any,
        words: str,
        strength: float,
        fresh: bool,
        seed: Any,
        margin: Any,
        exactness: Any,
        reference: Any,
        bar: Any = progress,
    ) -> Any:
        noise = int(seed or 0) + next(count) if fresh else None
        options = config(margin, exactness, reference)
        made = bench.edit(painted(value), words, options, _tell(bar), strength=strength, seed=noise)
        large = [enlarged(made.pictures[kind]) for kind in ("dense", "sparse")]
        return canvas(made.pictures["sparse"]), made.verdict(), *large, made.table(), enlarged(made.recomputed)

    def undo() -> Any:
        return canvas(bench.undo()), *empty

    def reload() -> Any:
        return None if bench.picture is None else canvas(bench.picture)

    def wire(triggers: list[Any], action: Callable[..., Any], given: list[str], busy: list[Any]) -> None:
        inputs = [widgets[name] for name in given]
        gr.on(triggers, _told(gr, action), inputs, everything, show_progress_on=busy, **alone)

    first, pair = [widgets["canvas"]], [results["dense"], results["sparse"]]
    options = ["seed", "margin", "exactness", "reference"]
    wire([widgets["generate"].click, widgets["shows"].submit], generate, ["shows", *options], first)
    wire([widgets["upload"].upload], upload, ["upload", "shows", *options], first)
    given = ["canvas", "words", "strength", "fresh", *options]
    wire([widgets["edit"].click, widgets["words"].submit], edit, given, pair)
    wire([widgets["undo"].click], undo, [], first)
    page.load(reload, None, widgets["canvas"], **alone)


def config(margin: float, exactness: Any, reference: Any) -> SparseEditConfig:
    """What the options say."""
    return SparseEditConfig(margin=int(margin), exactness=exactness, reference=reference)


def painted(value: dict[str, Any] | None) -> np.ndarray | None:
    """The mask of what an image editor gives: where any of its layers is not transparent; None without layers."""
    layers = [layer for layer in (value or {}).get("layers", []) if layer is not None]
    alphas = [np.asarray(layer.convert("RGBA").getchannel("A")) > 0 for layer in layers]
    return np.any(alphas, axis=0) if alphas else None


def canvas(picture: Image.Image) -> dict[str, Any]:
    """What an image editor shows: the picture, with nothing painted on it."""
    large = enlarged(picture)
    return {"background": large, "layers": [], "composite": large}


def enlarged(picture: Image.Image) -> Image.Image:
    """To a side that can be painted on."""
    return picture.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC) if picture.width < CANVAS else picture


def _tell(progress: Any) -> Callable[[float, str], Any]:
    return lambda share, what: progress(share, desc=what)


def _told(gr: Any, action: Callable[..., Any]) -> Callable[..., Any]:
    """What goes wrong becomes a sentence, and the page stays as it is; `gr.Error` would lay itself over the canvas."""

    @functools.wraps(action)
    def careful(*args: Any) -> Any:
        try:
            return action(*args)
        except (ValueError, TypeError, RuntimeError, MemoryError) as error:
            gr.Warning(str(error))
            return gr.skip()

    return careful
