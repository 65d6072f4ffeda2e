"""The page to try edits, `diffaccel edit-demo`: what it does without Gradio, and the page in a real browser."""

import re
import shutil
import socket
import sys

import numpy as np
import pytest
from PIL import Image

from diffaccel import zoo
from diffaccel.cli import main
from diffaccel.kernels import web
from diffaccel.kernels.comparison import Comparison
from diffaccel.kernels.config import SparseEditConfig
from diffaccel.kernels.report import EditReport
from diffaccel.kernels.workbench import Workbench, load

SIZE = 128
BOX = np.s_[40:72, 56:88]  # rows, columns
DEFAULT = SparseEditConfig()


def silent(share, what):
    pass


@pytest.fixture(scope="module")
def pipe():
    return load("emoji-sd")


@pytest.fixture
def bench(pipe):
    made = Workbench(pipe, steps=3, size=SIZE)
    yield made
    made.editor.remove()


def square():
    mask = np.zeros((SIZE, SIZE), bool)
    mask[BOX] = True
    return mask


def report(seconds, calls, **others):
    values = {"reference_seconds": 3.0, "dense_seconds": 0.0, "call_seconds": dict.fromkeys(calls, 0.1), "share": 0.2}
    return EditReport(seconds=seconds, calls=calls, **{**values, "memory": 2**21, **others})


def compared(dense, sparse, calls=None, **others):
    reports = {"dense": report(dense, {"dense": 4}), "sparse": report(sparse, calls or {"sparse": 4}, **others)}
    return Comparison({}, reports, 0.1, 2, 2 * dense, 2 * sparse + 3, Image.new("RGB", (8, 8)))


def test_an_edit_is_made_dense_and_sparse_and_the_sparse_one_stays(bench):
    before = bench.generate("red heart", 0, DEFAULT, silent)
    made = bench.edit(square(), "blue book", DEFAULT, silent, seed=1)
    assert made.reports["dense"].calls == {"dense": 3}
    assert made.reports["sparse"].calls == {"sparse": 3}
    assert np.array_equal(bench.picture, made.pictures["sparse"])
    pixels = {kind: np.asarray(picture, int) for kind, picture in made.pictures.items()}
    change = np.abs(pixels["sparse"] - np.asarray(before, int))
    assert change[BOX].mean() > 20
    assert change[:8].max() == 0
    inside = ((pixels["dense"] - pixels["sparse"])[BOX] / 255) ** 2
    assert made.difference == pytest.approx(np.sqrt(inside.mean()), rel=1e-4)
    assert made.dense_seconds == made.reports["dense"].seconds
    assert made.sparse_seconds > made.reports["sparse"].seconds + made.reports["sparse"].reference_seconds * 0.999
    assert np.array_equal(bench.undo(), before)
    with pytest.raises(ValueError, match="no edit to take back"):
        bench.undo()


def test_times_add_up_until_the_next_picture(bench):
    bench.generate("red heart", 0, DEFAULT, silent)
    first = bench.edit(square(), "blue book", DEFAULT, silent)
    second = bench.edit(square(), "green book", DEFAULT, silent)
    assert (first.edits, second.edits) == (1, 2)
    assert second.dense_seconds == pytest.approx(sum(made.reports["dense"].seconds for made in (first, second)))
    bench.generate("red heart", 0, DEFAULT, silent)
    assert bench.edit(square(), "blue book", DEFAULT, silent).edits == 1


def test_new_noise_gives_another_picture_and_the_old_noise_the_same(bench):
    bench.generate("red heart", 0, DEFAULT, silent)
    pictures = []
    for seed in (1, 2, None, None):
        pictures.append(np.asarray(bench.edit(square(), "blue book", DEFAULT, silent, seed=seed).pictures["sparse"]))
        bench.undo()
    assert not np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[2], pictures[3])


def test_margin_and_exactness_change_at_once_the_reference_with_the_next_picture(bench):
    bench.generate("red heart", 0, DEFAULT, silent)
    narrow = bench.edit(square(), "blue book", SparseEditConfig(margin=1, reference="self"), silent)
    wide = bench.edit(square(), "blue book", SparseEditConfig(margin=8), silent)
    assert narrow.reports["sparse"].calls == {"sparse": 3}
    assert narrow.reports["sparse"].share < wide.reports["sparse"].share
    probed = bench.edit(square(), "red book", SparseEditConfig(exactness="bounded", tolerance=1.0), silent)
    assert "probe: error" in probed.table()
    bench.generate("red heart", 0, SparseEditConfig(reference="self"), silent)
    made = bench.edit(square(), "blue book", DEFAULT, silent)
    assert made.reports["sparse"].calls == {"dense": 1, "sparse": 2}


def test_progress_rises_over_both_runs(bench):
    told = []
    bench.generate("red heart", 0, DEFAULT, lambda share, what: told.append((share, what)))
    assert told[-1] == (1.0, "making the picture: step 3 of 3")
    told.clear()
    bench.edit(square(), "blue book", DEFAULT, lambda share, what: told.append((share, what)))
    assert [share for share, _ in told] == sorted(share for share, _ in told)
    assert (told[0], told[-1]) == ((0.0, "dense edit"), (1.0, "sparse edit: step 3 of 3"))


def test_own_picture_is_cut_to_a_square_on_white(bench, tmp_path):
    own = Image.new("RGBA", (300, 200))  # transparent
    own.paste((255, 0, 0, 255), (100, 50, 200, 150))
    own.save(tmp_path / "own.png")
    taken = bench.upload(tmp_path / "own.png", "red square", 0, DEFAULT, silent)
    pixels = np.asarray(taken, int)
    assert taken.size == (SIZE, SIZE)
    assert pixels[:16, :16].min() > 200
    assert (np.abs(pixels[64, 64] - (255, 0, 0)) < 60).all()
    assert "sparse" in bench.edit(square(), "blue book", DEFAULT, silent).reports["sparse"].calls


def test_bad_input_is_answered_with_what_to_do(bench, tmp_path):
    with pytest.raises(ValueError, match="no picture yet: click Generate"):
        bench.edit(square(), "x", DEFAULT, silent)
    with pytest.raises(ValueError, match="Say in a few words"):
        bench.generate("  ", 0, DEFAULT, silent)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture; use a PNG"):
        bench.upload(tmp_path / "text.png", "", 0, DEFAULT, silent)
    before = bench.generate("red heart", 0, DEFAULT, silent)
    for empty in (None, np.zeros((512, 512), bool)):
        with pytest.raises(ValueError, match="Nothing is painted yet"):
            bench.edit(empty, "x", DEFAULT, silent)
    assert np.array_equal(bench.picture, before)


def test_features_that_do_not_fit_are_refused_with_what_to_do(pipe, monkeypatch):
    monkeypatch.setattr("diffaccel.kernels.workbench._free_memory", lambda device: 2**22)
    bench = Workbench(pipe, steps=3, size=SIZE)
    try:
        with pytest.raises(MemoryError, match="reference='self'"):
            bench.generate("red heart", 0, DEFAULT, silent)
        bench.generate("red heart", 0, SparseEditConfig(reference="self"), silent)
    finally:
        bench.editor.remove()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"steps": 0}, "1 or more, not 0"), ({"size": 100}, "multiple of 8, such as 256, not 100")],
)
def test_impossible_options_are_refused(pipe, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Workbench(pipe, **options)


def test_verdict_claims_only_what_was_measured():
    assert "Sparse was 4.0 times as fast as dense**: sparse 0.50 s, dense 2.00 s" in compared(2.0, 0.5).verdict()
    assert "Sparse lost: it was 1.5 times as slow" in compared(1.0, 1.5).verdict()
    assert "about the same time" in compared(1.0, 0.98).verdict()
    whole = compared(2.0, 0.5, {"dense": 4}, note="ran dense: the region is 80% of the picture").verdict()
    assert "No gain: this edit ran dense" in whole
    assert "as fast" not in whole
    assert whole.endswith("Note: ran dense: the region is 80% of the picture.")
    assert (
        "Counting the 3.00 s that the reference (the first picture) took, sparse has taken 4.00 s"
        in compared(2.0, 0.5).verdict()
    )


def test_table_has_a_row_for_each_measure():
    made = compared(2.0, 0.5, seam=0.03, probes=((0, 4, 0.02),))
    lines = made.table().splitlines()
    assert {line.count("|") for line in lines} == {5}
    assert "| this edit, end to end | 2.000 s | 0.500 s | 4.00x |" in lines
    assert "| all edits so far (2), reference included | 4.000 s | 4.000 s | 1.00x |" in lines
    assert "| probe: error of a call in the mask |  | 2.00% |  |" in lines
    assert "| memory for kept features |  | 2 MiB |  |" in lines


def test_mask_is_what_is_painted_on_any_layer():
    layers = [Image.new("RGBA", (512, 512)) for _ in range(2)]
    layers[0].putpixel((7, 3), (255, 0, 0, 90))
    layers[1].putpixel((100, 200), (255, 0, 0, 255))
    mask = web.painted({"background": None, "layers": layers, "composite": None})
    assert mask is not None
    assert np.argwhere(mask).tolist() == [[3, 7], [200, 100]]
    assert web.painted(None) is None
    assert web.painted({"background": None, "layers": [], "composite": None}) is None


def test_a_folder_of_parts_is_opened_with_the_rest_of_emoji_sd(tmp_path, pipe):
    zoo.load("emoji-sd-small").save_pretrained(tmp_path / "unet")
    found = load(str(tmp_path))
    parameters = [sum(p.numel() for p in one.unet.parameters()) for one in (found, pipe)]
    assert parameters[0] < parameters[1]
    assert found("x", num_inference_steps=1).images[0].size == (64, 64)


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["edit-demo"]) == 2
    assert "edit-demo needs gradio; pip install 'diffaccel[demo]'" in capsys.readouterr().err


def test_a_taken_port_is_named(capsys):
    pytest.importorskip("gradio", minversion="6")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["edit-demo", "--port", str(port), "--steps", "1"]) == 2
    assert f"port {port} of this machine is taken; give another one" in capsys.readouterr().err


# The page in a browser


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser on PATH: {', '.join(names)}")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def elsewhere(monkeypatch):
    """Addresses beyond this machine that this process connects to."""
    found, connect = [], socket.socket.connect

    def noted(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            found.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    return found


@pytest.fixture
def url(bench, elsewhere):
    pytest.importorskip("gradio", minversion="6")
    page = web.build(bench, "emoji-sd", 3)
    _, address, _ = web.launch(page, None)
    yield address
    page.close()


def painted_stroke(page, down, across):
    """Drag the mouse over a part of the canvas, given as shares of its height and width."""
    box = page.locator("#canvas canvas").first.bounding_box()
    x, y = box["x"] + across * box["width"], box["y"] + down * box["height"]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 24, y + 8, steps=6)
    page.mouse.up()


def test_page_in_a_browser(browser, url, bench, elsewhere):
    page = browser.new_page(viewport={"width": 1400, "height": 1250})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.fill("#shows input, #shows textarea", "red heart")
    page.click("#generate")
    page.wait_for_function("() => !document.querySelector('#canvas .progress-text')")
    page.locator("#canvas canvas").first.wait_for()
    for _ in range(100):
        if bench.picture is not None:
            break
        page.wait_for_timeout(200)
    page.wait_for_timeout(2000)  # the canvas fades in
    before = np.asarray(bench.picture, int)

    page.click("#edit")
    page.get_by_text("Nothing is painted yet: paint over the part that should change, then click Edit.").wait_for()
    assert bench.editor.report is None

    painted_stroke(page, 0.7, 0.6)
    page.wait_for_timeout(500)
    page.fill("#words input, #words textarea", "blue book")
    page.click("#edit")
    page.locator("#table table").wait_for(timeout=120_000)
    for name in ("#dense", "#sparse", "#recomputed"):
        page.locator(f"{name} img").wait_for()
    assert re.search(r"sparse \d+\.\d\d s, dense \d+\.\d\d s|ran dense", page.inner_text("#verdict"))
    rows = page.locator("#table tr").all_inner_texts()
    assert any(re.search(r"end to end\s+\d+\.\d+ s\s+\d+\.\d+ s\s+\d+\.\d+x", row) for row in rows), rows

    rows, columns = np.nonzero(bench.editor.report.region.masks[0])
    assert abs(rows.mean() / 32 - 0.7) < 0.12  # where it was painted, not mirrored or turned
    assert abs(columns.mean() / 32 - 0.6) < 0.12
    change = np.abs(np.asarray(bench.picture, int) - before)
    assert change.max() > 50
    assert change[:24].max() == 0

    page.click("#undo")
    page.get_by_text("Generate a picture, paint over a part").wait_for()
    assert np.array_equal(bench.picture, before)
    assert {address.split("/")[2] for address in asked if not address.startswith(("data:", "blob:"))} == {
        url.split("/")[2]
    }
    assert elsewhere == []
