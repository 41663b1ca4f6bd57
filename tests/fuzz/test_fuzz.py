"""A few hundred spoiled files of every kind: a line each, or what was meant."""

from __future__ import annotations

import os

import pytest

from fuzz.command import warm
from fuzz.damage import BYTES
from fuzz.kinds import KINDS
from fuzz.outcomes import BAD, case, keep, outcome, tried

# Cases of a kind, so that all take less than 90 seconds on two cores.
CASES = {"onnx": 60, "state": 60, "checkpoint": 200, "bundle": 200, "choice": 200}
USUAL = 300


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    warm()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_spoiled_files(tmp_path, name):
    kind = KINDS[name]
    tally = tried(kind, tmp_path, seed=1, first=0, count=CASES.get(name, USUAL))
    bad = [f"{one.number} {one.outcome} ({one.way}): {one.said[-800:]}" for one in tally.failures]
    assert bad == []
    assert sum(tally.counts.values()) == CASES.get(name, USUAL)
    # Neither all through nor all refused: else the cases would show nothing.
    assert tally.counts["refused"] > 0


def test_the_same_numbers_make_the_same_case():
    files = {"a.bin": bytes(range(256)) * 8}
    kind = KINDS["library"]
    made, again = ([case(kind, files, 3, i) for i in range(200)] for _ in range(2))
    assert made == again
    assert made[1] != case(kind, files, 4, 1)
    assert {way.split()[0] for way, _ in made} == {way.__name__ for way in BYTES}


class _Odd:
    """A kind whose files hold what becomes of them."""

    @staticmethod
    def good(folder):
        (folder / "a").write_text("right")

    @staticmethod
    def spoil(rng, files):
        word = rng.choice(
            ("right", "traceback", "crashed", "hung", "unclear", "refused", "changed")
        )
        return "flip" if word == "changed" else "x", {"a": word.encode(), "b": b"needless"}

    @staticmethod
    def use(folder):
        from asvit_deploy.errors import UserError

        word = (folder / "a").read_text() if (folder / "a").exists() else "right"
        if word == "traceback":
            raise KeyError(word)
        if word == "crashed":
            os.abort()
        while word == "hung":
            pass
        if word in ("refused", "unclear"):
            raise UserError(f"{folder / 'a' if word == 'refused' else 'it'} is bad; mend it")
        return word


def test_each_bad_end_is_told_from_the_others(tmp_path, monkeypatch):
    """And what fails is kept, without what it does not need."""
    import json

    from fuzz import outcomes
    from fuzz.kinds import Kind

    monkeypatch.setattr(outcomes, "PATIENCE", 1.0)
    kind = Kind("odd", _Odd.good, _Odd.spoil, _Odd.use, frozenset(("flip",)))
    tally = tried(kind, tmp_path / "w", seed=0, first=0, count=25)
    wanted = [case(kind, {"a": b"right"}, 0, i)[1]["a"].decode() for i in range(25)]
    assert {**tally.counts} == {word: wanted.count(word) for word in wanted}
    assert {one.outcome for one in tally.failures} == set(BAD)
    assert all(wanted[one.number] == one.outcome for one in tally.failures)
    keep(kind, tmp_path / "w", tmp_path / "kept", tally)
    for one in tally.failures:
        folder = tmp_path / "kept" / f"odd-0-{one.number}"
        assert json.loads((folder / "SAID.json").read_text())["outcome"] == one.outcome
        assert (folder / "a").read_text() == one.outcome
        if one.outcome in ("traceback", "crashed", "unclear"):
            assert not (folder / "b").exists()


def test_what_is_not_promised_is_not_counted_as_kept(tmp_path):
    """A kind whose format does not promise that damage shows says nothing of what changed."""
    from fuzz.command import report_of, table
    from fuzz.kinds import Kind

    def spoil(rng, files):
        return "flip", {"a": b"changed"}

    tallies = [
        tried(Kind(name, _Odd.good, spoil, _Odd.use, ways), tmp_path / name, 0, 0, count=3)
        for name, ways in (("sealed", frozenset(("flip",))), ("open", frozenset()))
    ]
    report = report_of(tallies, 0, 0)
    assert [(row["right"], row["changed"]) for row in report["kinds"]] == [(0, 3), (3, None)]
    assert report["all"]["changed"] == 3
    assert [line.count("not promised") for line in table(report).splitlines()] == [0, 0, 1, 0]


def test_the_published_table_says_what_is_promised():
    import json

    from fuzz.command import ROOT

    rows = json.loads((ROOT / "benchmarks" / "reliability.json").read_text())["fuzz"]["kinds"]
    assert {row["kind"] for row in rows} == set(KINDS)
    for row in rows:
        assert (row["changed"] is not None) == bool(KINDS[row["kind"]].promised)


def test_one_bit_of_a_checkpoint_of_ours(tmp_path):
    """0 changed weights that load: every place of header and tensors, sidecar or none."""
    import random

    from fuzz.kinds import files_of, fresh, put_files

    kind = KINDS["checkpoint"]
    (tmp_path / "good").mkdir()
    kind.good(tmp_path / "good")
    good, rng = files_of(tmp_path / "good"), random.Random(5)
    meant, found = kind.use(tmp_path / "good"), []
    data = good["x.safetensors"]
    for number in range(40):
        changed = bytearray(data)
        changed[rng.randrange(len(data)) if number % 2 else number * 40] ^= 1 << number % 8
        files = {"x.safetensors": bytes(changed)}
        if number % 4 < 2:
            files["x.safetensors.json"] = good["x.safetensors.json"]
        put_files(fresh(tmp_path / "case"), files)
        found.append(outcome(kind, tmp_path / "case", "flip", meant)[0])
    assert found == ["refused"] * 40
