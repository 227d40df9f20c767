"""What a user gets wrong: a message that says what, where and what to do, the right exit code, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import picture_bytes, sample_members, write_data_set, write_tar, write_tiny_run

from mmfuse import cli
from mmfuse.errors import CheckpointError, ConfigError, ShardError, TrainingError
from mmfuse.train.checkpoint import complete_checkpoints
from mmfuse.train.run import load_run
from mmfuse.train.state_files import StoredState

SETTINGS, DATA, CHECKPOINT = ConfigError.exit_code, ShardError.exit_code, CheckpointError.exit_code
TRAINING = TrainingError.exit_code


class Command:
    """`mmfuse` in this process: its exit code, and what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object, fails: int, says: tuple[str, ...]) -> str:
        """Standard output of a command, which must end with this exit code and say these words on standard error."""
        self._capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        printed = self._capsys.readouterr()
        assert code == fails, printed.err
        for words in says:
            assert words in printed.err
        assert "Traceback" not in printed.err
        return printed.out


@pytest.fixture
def mmfuse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)  # what a command writes by mistake is found here
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return Command(capsys)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The recipe of a small, good data set."""
    return write_data_set(tmp_path / "set", modalities=("text", "image"))


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    """A tiny run of it."""
    return write_tiny_run(tmp_path, data)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def damage(shard: Path, offset: int, content: bytes) -> None:
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(content)


# Settings


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stpes=3", ("tiny.yaml", "train: unknown setting 'stpes'; did you mean 'steps'?")),
        ("train.steps=many", ("tiny.yaml", "train.steps = 'many'", "valid integer")),
        ("model.fusion={}", ("contradicts itself", "model.fusion is set, but no objective trains it", "null")),
        ("train.steps", ("--set 'train.steps'", "NAME.NAME=VALUE")),
        ("data.train=[{recipe: emoji_smaple}]", ("no recipe 'emoji_smaple'; did you mean 'emoji_sample'?",)),
        ("data.train=[{recipe: set/recipe.yaml, split: test}]", ("no split 'test'; it has train",)),
    ],
)
def test_wrong_settings_are_told_before_anything_is_written(
    mmfuse: Command, tmp_path: Path, run: Path, fresh_accelerator: None, override: str, says: tuple[str, ...]
) -> None:
    before = files_in(tmp_path)
    mmfuse("train", run, "--set", override, fails=SETTINGS, says=("mmfuse: error: ", *says))
    assert files_in(tmp_path) == before


def test_an_unknown_run_in_a_process_of_its_own_is_one_line_and_no_traceback() -> None:
    command = [sys.executable, "-m", "mmfuse", "train", "quikstart"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == SETTINGS
    assert done.stderr.splitlines() == [
        "mmfuse: error: no run 'quikstart'; did you mean 'quickstart'? (a path must end in .yaml)"
    ]
    assert done.stdout == ""


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from mmfuse import cli; cli.build_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_more_ranks_than_rows_are_refused_with_both_numbers(run: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"9 ranks, but a micro-batch has only 4 rows .*start fewer processes or raise"
    ) as e:
        load_run(str(run)).check_world_size(9)
    assert e.value.exit_code == SETTINGS


def test_an_output_folder_that_is_a_file_is_refused(
    mmfuse: Command, tmp_path: Path, run: Path, fresh_accelerator: None
) -> None:
    (tmp_path / "out").write_text("notes")
    mmfuse("train", run, fails=SETTINGS, says=("output_dir", str(tmp_path / "out"), "choose another"))
    assert (tmp_path / "out").read_text() == "notes"
    inside = f"output_dir={tmp_path / 'out' / 'run'}"
    mmfuse("train", run, "--set", inside, fails=SETTINGS, says=("output_dir", "cannot be a folder"))


# Shards


@pytest.mark.parametrize("command", ["index", "check", "stats"])
def test_a_missing_folder_is_named(mmfuse: Command, tmp_path: Path, command: str) -> None:
    mmfuse("shards", command, "no/such/folder", fails=DATA, says=("no/such/folder", "check the path"))
    assert files_in(tmp_path) == set()


def test_training_on_a_missing_folder_names_it(
    mmfuse: Command, tmp_path: Path, run: Path, fresh_accelerator: None
) -> None:
    for shard in (tmp_path / "set").glob("train-*"):
        shard.unlink()
    mmfuse("train", run, fails=DATA, says=("set/train-*.tar: matches no file", "check the path"))
    assert not (tmp_path / "out").exists()


def test_a_missing_index_is_told_with_the_command_that_makes_it(
    mmfuse: Command, tmp_path: Path, run: Path, fresh_accelerator: None
) -> None:
    for index in (tmp_path / "set").glob("*.mmindex"):
        index.unlink()
    says = (".mmindex: is not there", f"run: mmfuse shards index {tmp_path / 'set'}")
    mmfuse("train", run, fails=DATA, says=says)
    says = ("train-0.tar: is not indexed", "run: mmfuse shards index")
    mmfuse("shards", "stats", tmp_path / "set", fails=DATA, says=says)
    (tmp_path / "set/manifest.mmindex.json").unlink()
    says = ("train-0.tar and 1 more: not indexed", f"run: mmfuse shards index {tmp_path / 'set'}")
    mmfuse("train", run, fails=DATA, says=says)
    assert not (tmp_path / "out/checkpoints").exists()
    assert not list((tmp_path / "set").glob("*.mmindex"))


@pytest.mark.parametrize("command", ["index", "check"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("cut off", ("cut off", "byte 700", "build this shard again")),
        ("damaged header", ("damaged header at byte 0", "build this shard again")),
        ("pickle", ("sample '0001' has a member .pkl", "pickles run code", "store arrays as .npy")),
    ],
)
def test_a_bad_shard_is_named_and_the_others_are_still_done(
    mmfuse: Command, tmp_path: Path, command: str, fault: str, says: tuple[str, ...]
) -> None:
    good = write_tar(tmp_path / "1.tar", sample_members(1, ["text"]))
    bad = write_tar(tmp_path / "11.tar", {"0001.txt": b"x" * 300} | ({"0001.pkl": b"x"} if fault == "pickle" else {}))
    if fault == "cut off":
        os.truncate(bad, 700)
    if fault == "damaged header":
        damage(bad, 148, b"7")
    mmfuse("shards", command, "*.tar", fails=DATA, says=(f"{bad.name}: ", *says))
    assert files_in(tmp_path) == {good.name, f"{good.name}.mmindex", bad.name, "manifest.mmindex.json"}


def test_a_shard_that_became_damaged_stops_training(
    mmfuse: Command, tmp_path: Path, run: Path, fresh_accelerator: None
) -> None:
    os.truncate(tmp_path / "set/train-1.tar", 2000)
    mmfuse("train", run, fails=DATA, says=("train-1.tar: has 2000 bytes", "run: mmfuse shards index"))
    assert not (tmp_path / "out").exists()


def test_a_text_called_jpg_is_found_by_check(mmfuse: Command, tmp_path: Path) -> None:
    write_tar(tmp_path / "1.tar", {"0001.jpg": b"not a picture", "0002.jpg": picture_bytes(2)})
    write_tar(tmp_path / "11.tar", {"0003.txt": b"\xff"})
    says = ("1.tar: 0001.jpg: not_decodable: not a readable JPEG", "11.tar: 0003.txt: not_decodable: not UTF-8")
    found = json.loads(mmfuse("shards", "check", "--json", "--findings", "found.jsonl", ".", fails=DATA, says=says))
    assert (found["samples"], found["good"], found["findings"]) == (3, False, {"not_decodable": 2})
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["key"]) for line in lines] == [("1.tar", "0001"), ("11.tar", "0003")]
    quarantine = ("shards", "quarantine", "--from", "found.jsonl", "--any-member", ".")
    assert "2 samples in 2 shards are left out" in mmfuse(*quarantine, fails=0, says=())
    (tmp_path / "11.tar").unlink()
    printed = mmfuse("shards", "check", "1.tar", fails=DATA, says=says[:1])
    assert printed.startswith("2 samples with 2 members checked")


def test_check_reads_a_good_shard_whose_name_ends_that_of_a_damaged_one(mmfuse: Command, tmp_path: Path) -> None:
    write_tar(tmp_path / "1.tar", {"0001.jpg": b"not a picture"})
    write_tar(tmp_path / "11.tar", {"0002.jpg": picture_bytes(2)})
    damage(tmp_path / "11.tar", 148, b"7")
    mmfuse("shards", "check", "1.tar", "11.tar", fails=DATA, says=("11.tar: damaged", "1.tar: 0001.jpg"))


def test_training_goes_on_without_a_text_called_jpg_and_names_it(
    mmfuse: Command, tmp_path: Path, run: Path, fresh_accelerator: None
) -> None:
    members = sample_members(0, ["text"]) | {"0000.jpg": b"not a picture"} | sample_members(1, ["text", "image"])
    write_tar(tmp_path / "set/train-0.tar", members)
    (tmp_path / "set/train-1.tar").unlink()
    mmfuse("shards", "index", "--force", tmp_path / "set", fails=0, says=())
    mmfuse("train", run, fails=0, says=("set/train-0.tar/0000.jpg: not a readable JPEG", "quarantine.rank0.jsonl"))
    fault = json.loads((tmp_path / "out/quarantine.rank0.jsonl").read_text().splitlines()[0])
    assert (fault["key"], fault["extension"], fault["lost"]) == ("0000", "jpg", False)
    mmfuse(
        "train",
        run,
        "--set",
        "data.quarantine.judge_after=1",
        "--set",
        f"output_dir={tmp_path / 'strict'}",
        fails=DATA,
        says=("data.quarantine.max_share = 0.01", "mmfuse shards check"),
    )
    assert not (tmp_path / "strict/checkpoints").exists()


def test_stats_as_json_parse_and_add_up(mmfuse: Command, tmp_path: Path, data: Path) -> None:
    stats = json.loads(mmfuse("shards", "stats", "--json", tmp_path / "set", fails=0, says=()))
    assert (stats["shards"], stats["samples"], stats["subsets"]) == (2, 8, {"image+text": 8})
    assert stats["member_bytes"]["jpg"]["count"] == 8
    assert stats["bytes"] == sum(shard.stat().st_size for shard in (tmp_path / "set").glob("*.tar"))
    table = mmfuse("shards", "stats", tmp_path / "set", fails=0, says=())
    assert "image + text" in table and "100.0%" in table


# Checkpoints


def test_a_checkpoint_of_another_run_is_refused_with_what_differs_and_kept(
    mmfuse: Command, tmp_path: Path, run: Path, data: Path, fresh_accelerator: None
) -> None:
    mmfuse("train", run, fails=0, says=())
    before = files_in(tmp_path)
    for change, words in (
        ("seed=1", "seed: 0 then, 1 now"),
        ("train.global_batch=8", "train.global_batch: 4 then, 8 now"),
        ("model.width=32", "model.width: 16 then, 32 now"),
    ):
        says = ("step_00000002 belongs to another run", words, "choose another name or output_dir")
        mmfuse("train", run, "--set", change, fails=CHECKPOINT, says=says)
    write_tar(tmp_path / "set/train-1.tar", sample_members(77, ["text", "image"]))
    mmfuse("shards", "index", "--force", tmp_path / "set", fails=0, says=())
    mmfuse("train", run, fails=CHECKPOINT, says=("belongs to another run", "data: index_hash of set/train was "))
    assert files_in(tmp_path) == before


def test_a_checkpoint_beyond_the_last_step_is_refused_with_both_numbers_and_kept(
    mmfuse: Command, tmp_path: Path, run: Path, fresh_accelerator: None
) -> None:
    mmfuse("train", run, fails=0, says=())
    before = files_in(tmp_path)
    shorter = ("--set", "train.steps=1", "--set", "optimizer.warmup_steps=0")
    says = ("step_00000002 belongs to", "train.steps: it has done 2 steps, this run ends after 1", "another name")
    mmfuse("train", run, *shorter, fails=CHECKPOINT, says=says)
    assert files_in(tmp_path) == before
    mmfuse("train", run, fails=0, says=())  # one that is just done is not


def test_a_learning_rate_that_is_far_too_high_ends_the_run_and_leaves_the_weights_of_before(
    mmfuse: Command, tmp_path: Path, run: Path, fresh_accelerator: None
) -> None:
    settings = ("--set", "optimizer.encoder_learning_rate=1e9", "--set", "train.checkpoint_every=1")
    settings += ("--set", "train.steps=4")
    says = ("were skipped for a gradient that is NaN or infinite", "Lower the learning rate, raise optimizer.warmup")
    mmfuse("train", run, *settings, fails=TRAINING, says=says)
    weights = StoredState(complete_checkpoints(tmp_path / "out/checkpoints")[-1]).whole("model")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_evaluating_what_is_no_checkpoint_or_a_damaged_one_is_refused(
    mmfuse: Command, tmp_path: Path, run: Path, fresh_accelerator: None
) -> None:
    (tmp_path / "empty").mkdir()
    for place in ("empty", "no/such/folder", run):
        mmfuse("eval", place, fails=CHECKPOINT, says=(str(place), "is no complete checkpoint", "step_NNNNNNNN"))
    mmfuse("train", run, fails=0, says=())
    folder = tmp_path / "out/checkpoints/step_00000002"
    damage(folder / "model-00000.safetensors", 3000, b"\xff\xff")
    mmfuse("eval", folder, fails=CHECKPOINT, says=(str(folder), "model-00000.safetensors has changed", "checksum"))
    assert not folder.with_name(f"{folder.name}.evaluation").exists()


def test_an_unknown_device_is_refused(mmfuse: Command, tmp_path: Path) -> None:
    mmfuse("eval", tmp_path, "--device", "gpu", fails=SETTINGS, says=("device gpu", "use cpu, cuda or cuda:N"))
