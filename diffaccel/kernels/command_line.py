"""Arguments of `diffaccel edit-demo`; nothing that is heavy is imported before the command runs."""

from __future__ import annotations

import argparse
from typing import Any


def add_edit_demo(commands: Any) -> None:
    """Add `edit-demo` to the parser of `diffaccel`."""
    what = "a local page: paint over a part of a picture, see dense and sparse edits and their times"
    parser = commands.add_parser("edit-demo", help=what, description=f"{what}. Needs pip install 'diffaccel[demo]'.")
    model = "emoji-sd, a folder, or a hub id of a text-to-image model (default: emoji-sd)"
    parser.add_argument("model", nargs="?", default="emoji-sd", help=model)
    parser.add_argument("--port", type=int, default=7860, help="of this machine; others cannot see it (default: 7860)")
    parser.add_argument("--steps", type=int, default=10, help="of a picture (default: 10)")
    size = "side of a picture in pixels (default: the model's own, and at least 256)"
    parser.add_argument("--size", type=int, help=size)
    parser.set_defaults(run=_edit_demo)


def _edit_demo(args: argparse.Namespace) -> None:
    from diffaccel.kernels.web import serve

    serve(args.model, port=args.port, steps=args.steps, size=args.size)
