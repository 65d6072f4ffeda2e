import hashlib
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from diffaccel.eval.errors import DataError, MissingWeights
from diffaccel.eval.networks.weights import HOME, WeightsFile, find_weights, sha256_of, tensors_sha256
from tests.eval.offline import _no_network  # noqa: F401

CONTENT = b"the weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
SPEC = WeightsFile(
    "net-1.pth",
    (DIGEST,),
    "https://example.org/net-1.pth",
    "Apache-2.0",
    aliases=("net.pth",),
    folders=("~/.cache/net",),
    packaged="packaged_net_of_a_test/data/net.bin",
)


@pytest.fixture
def places(tmp_path, monkeypatch) -> dict[str, Path]:
    """Every place that is looked at, empty, in the order in which they are."""
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    package = tmp_path / "site" / "packaged_net_of_a_test"
    found = {
        "home": tmp_path / "home" / "net-1.pth",
        "hub": tmp_path / "torch" / "hub" / "checkpoints" / "net-1.pth",
        "tmp": tmp_path / "tmp" / "net-1.pth",
        "own": tmp_path / "user" / ".cache" / "net" / "net-1.pth",
        "package": package / "data" / "net.bin",
    }
    for path in found.values():
        path.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('this package must not be imported')")
    return found


def test_the_first_place_that_has_it_wins(places):
    for path in reversed(places.values()):
        path.write_bytes(CONTENT)
        assert find_weights(SPEC) == path
    assert "packaged_net_of_a_test" not in sys.modules


def test_an_alias_in_an_earlier_place_wins(places):
    places["hub"].write_bytes(CONTENT)
    alias = places["home"].with_name("net.pth")
    alias.write_bytes(CONTENT)
    assert find_weights(SPEC) == alias


def test_half_a_download_is_passed_over_and_named_if_nothing_else_is_there(places):
    places["home"].write_bytes(CONTENT[:5])
    places["package"].write_bytes(CONTENT)
    assert find_weights(SPEC) == places["package"]
    places["package"].unlink()
    with pytest.raises(MissingWeights, match="damaged, or not this file") as caught:
        find_weights(SPEC)
    assert hashlib.sha256(CONTENT[:5]).hexdigest() in str(caught.value)


def test_a_given_file_is_used_whatever_its_name_and_only_if_it_is_the_one(places, tmp_path):
    places["home"].write_bytes(CONTENT)
    mine = tmp_path / "mine.bin"
    mine.write_bytes(CONTENT)
    assert find_weights(SPEC, mine) == mine
    mine.write_bytes(b"something else")
    with pytest.raises(DataError, match=rf"mine\.bin is not net-1\.pth: .*{DIGEST}"):
        find_weights(SPEC, mine)


def test_a_given_place_is_the_only_one(places, tmp_path):
    places["home"].write_bytes(CONTENT)
    assert find_weights(SPEC, places["home"].parent) == places["home"]
    for given in (tmp_path, tmp_path / "nowhere.pth"):
        with pytest.raises(MissingWeights) as caught:
            find_weights(SPEC, given)
        assert str(places["home"]) not in str(caught.value)


def test_the_message_says_what_to_put_where(places, monkeypatch):
    with pytest.raises(MissingWeights) as caught:
        find_weights(SPEC)
    text = str(caught.value)
    assert caught.value.exit_code == 4
    for part in (SPEC.name, DIGEST, SPEC.url, SPEC.licence, HOME, "packaged_net_of_a_test", *map(str, places.values())):
        assert part in text
    monkeypatch.delenv(HOME)
    with pytest.raises(MissingWeights, match="not set now"):
        find_weights(SPEC)


def test_a_package_that_is_not_installed_is_no_place():
    spec = WeightsFile("x", ("0" * 64,), "u", "l", packaged="no_such_package_at_all/x")
    with pytest.raises(MissingWeights, match="install the Python package no_such_package_at_all"):
        find_weights(spec)


def test_the_start_of_a_hash_is_enough_but_not_none(places):
    places["home"].write_bytes(CONTENT)
    assert find_weights(WeightsFile("net-1.pth", (DIGEST[:8].upper(),), "u", "l")) == places["home"]
    for sha256 in ((), ("",), (DIGEST[:7],)):
        with pytest.raises(ValueError, match="never used unchecked"):
            WeightsFile("net-1.pth", sha256, "u", "l")


def test_hashes_are_kept_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(CONTENT)
    assert sha256_of(path) == DIGEST
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)
        assert sha256_of(path) == DIGEST  # not read again
    path.write_bytes(CONTENT[::-1])  # as long as before
    os.utime(path, ns=(1, 1))
    assert sha256_of(path) == hashlib.sha256(CONTENT[::-1]).hexdigest()


def test_hash_of_tensors_is_that_of_values_types_and_shapes():
    x = torch.arange(6.0).view(2, 3)
    assert tensors_sha256([x.t()]) == tensors_sha256([x.t().contiguous()])
    others = [[x], [x.t()], [x.flatten()], [x.half()], [x + 1], [x, x]]
    assert len({tensors_sha256(tensors) for tensors in others}) == len(others)
