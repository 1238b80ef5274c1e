"""How a result gets its place: durable, whole or not there, in any folder that can take it."""

import contextlib
import errno
import os
import shlex
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import duqpp
from duqpp.cli.main import main
from duqpp.config import QuantizeConfig
from duqpp.errors import CheckpointError, InputError
from duqpp.integrations.compressed_tensors import export_compressed_tensors
from duqpp.job import lock
from duqpp.job.folder import Output
from duqpp.models.source import SafetensorsSource
from tests.checkpoint import damage
from tests.job.test_resume import Stopped

RTN = QuantizeConfig(method="rtn")


@pytest.fixture(scope="module")
def model(make_tiny, tmp_path_factory) -> Path:
    """With a named chat template, which is in a folder of its own."""
    folder = tmp_path_factory.mktemp("source") / "model"
    damage.copy_of(make_tiny("llama", num_hidden_layers=1), folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    return folder


def quantize(model: Path, out: Path, **options) -> duqpp.QuantizeReport:
    return duqpp.quantize_model(str(model), out, RTN, **options)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file in a folder and below."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(model, out)
    return tree(out)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A checkpoint, and what its export holds."""
    folder = tmp_path_factory.mktemp("exported")
    quantize(model, folder / "checkpoint")
    export_compressed_tensors(folder / "checkpoint", folder / "out")
    return folder / "checkpoint", tree(folder / "out")


@pytest.fixture
def journal(monkeypatch) -> list[tuple[str, str]]:
    """The names that are synced, and those that files and folders get, in order."""
    entries = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        entries.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def note_replace(source, target) -> None:
        replace(source, target)
        entries.append(("rename", str(target)))

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return entries


@pytest.mark.parametrize("what", ["quantize", "export"])
def test_everything_is_on_the_disk_before_it_has_its_name(what, model, exported, tmp_path, journal):
    """Contents, then the names in folders, then the folder's own name, then its parent."""
    out, work = tmp_path / "out", tmp_path / "out.partial"
    if what == "quantize":
        quantize(model, out)
    else:
        export_compressed_tensors(exported[0], out)
    named = journal.index(("rename", str(out)))
    synced = [name for kind, name in journal[:named] if kind == "sync"]
    last = {name: len(synced) - synced[::-1].index(name) for name in synced}
    templates = work / "additional_chat_templates"
    for name in tree(out):
        assert str(work / name) in synced, f"{name} is not synced"
        assert last[str(work / name)] < last[str((work / name).parent)], name
    assert last[str(templates)] < last[str(work)]
    assert journal[named + 1 :] == [("sync", str(tmp_path))]
    assert synced[-1] == str(work)


def test_a_folder_that_is_there_is_filled_in_order(model, whole, tmp_path, journal):
    """config.json comes last, when all else is on the disk: without it nothing is a model."""
    out = tmp_path / "out"
    out.mkdir()
    quantize(model, out)
    assert tree(out) == whole
    moved = [name for kind, name in journal if kind == "rename" and Path(name).parent == out]
    assert moved[-1] == str(out / "config.json") and len(moved) == len(list(out.iterdir()))
    last = journal.index(("rename", moved[-1]))
    assert journal[last - 1 : last + 2 : 2] == [("sync", str(out))] * 2


@pytest.fixture
def mount_point(tmp_path) -> Iterator[Path]:
    """An empty folder that is a file system of its own, of 4 MiB."""
    out = tmp_path / "out"
    out.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(out)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"nothing can be mounted: {done.stderr.strip()}")
    yield out
    subprocess.run(["umount", "-l", str(out)], check=True)


def test_a_mount_point_is_filled(model, exported, whole, mount_point):
    (mount_point / "lost+found").mkdir()
    quantize(model, mount_point)
    assert tree(mount_point) == whole
    for file in mount_point.iterdir():
        subprocess.run(["rm", "-r", str(file)], check=True)
    export_compressed_tensors(exported[0], mount_point)
    assert tree(mount_point) == exported[1]


def test_a_disk_that_is_full_leaves_a_job_to_resume(model, whole, mount_point):
    space = mount_point / ".partial" / "other"

    def fill(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantize", 0):
            with pytest.raises(OSError, match="No space left"), open(space, "wb") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()

    with pytest.raises(InputError, match=r"No space left on device; continue with `resume=True`"):
        quantize(model, mount_point, progress=fill)
    space.unlink()
    quantize(model, mount_point, resume=True)
    assert tree(mount_point) == whole


def test_a_disk_that_is_too_small_is_said_before_any_work(model, tmp_path, monkeypatch):
    class Usage:
        total, free = 10**9, 100_000

    monkeypatch.setattr("duqpp.job.folder.shutil.disk_usage", lambda folder: Usage)
    blocks = []
    with pytest.raises(InputError, match=r"needs 0\.00 GB, and the disk of .* has 0\.00 GB left"):
        quantize(model, tmp_path / "out", progress=lambda *call: blocks.append(call))
    assert blocks == [("fingerprint", 0, 1)] and not list(tmp_path.iterdir())
    Usage.total = 0  # a file system that does not say
    quantize(model, tmp_path / "out")


def test_the_bytes_that_are_needed_are_those_of_the_tensors(model, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(Output, "check_space", lambda self, size: needed.append(size))
    report = quantize(model, tmp_path / "out")
    (size,) = needed
    assert 0.9 * report.weight_bytes < size < report.weight_bytes  # which has the headers besides


def empty(out: Path) -> None:
    """There, with nothing in it."""
    out.mkdir()


def absent(out: Path) -> None:
    """Not there."""


class Fault:
    """A job's calls behind its last block: one of them fails, or the process ends after it.

    Calls that sync a file are not counted: what they are for comes when the file is renamed.
    """

    CALLS = ("replace", "fsync", "unlink", "rmdir")

    def __init__(self, number: int, *, is_kill: bool) -> None:
        self.number, self.is_kill = number, is_kill
        self.count, self._is_late = 0, False

    @property
    def has_come(self) -> bool:
        """Whether there was such a call."""
        return self.count >= self.number

    def begin(self, stage: str, done: int, total: int) -> None:
        """The job's progress."""
        self._is_late = self._is_late or (stage, done) == ("quantize", total)

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        for name in self.CALLS:
            patch.setattr(os, name, self._planted(name, getattr(os, name)))

    def _planted(self, name: str, call: Callable) -> Callable:
        def operation(*arguments, **options):
            is_file = name == "fsync" and not stat.S_ISDIR(os.fstat(*arguments).st_mode)
            self.count += self._is_late and not is_file
            is_it = self._is_late and not is_file and self.count == self.number
            if is_it and not self.is_kill:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            result = None if name == "fsync" else call(*arguments, **options)
            if is_it:
                raise Stopped
            return result

        return operation


@pytest.mark.parametrize(
    ("prepare", "is_kill", "least"),
    [(absent, True, 12), (empty, True, 25), (absent, False, 12)],
    ids=["killed", "killed in a folder that is there", "error"],
)
def test_a_fault_at_any_late_step_leaves_a_job_to_resume(
    prepare, is_kill, least, model, whole, tmp_path, monkeypatch
):
    """Or a whole OUT, with nothing in it that only the job needed; either way the same bytes."""
    for number in range(1, 100):
        fault, out = Fault(number, is_kill=is_kill), tmp_path / str(number) / "out"
        out.parent.mkdir()
        prepare(out)
        with monkeypatch.context() as patch:
            fault.plant(patch)
            with contextlib.suppress(Stopped):
                try:
                    quantize(model, out, progress=fault.begin)
                except InputError as error:
                    assert "`resume=True`" in str(error)
        if not (out / "config.json").exists():
            report = quantize(model, out, resume=True)
            assert report.resumed_blocks == 1 and len(report.groups) == 4
        # A file that cannot be removed stays, with a warning; one of a job that is killed does not.
        assert tree(out) == whole or (not is_kill and whole.items() <= tree(out).items()), number
        if not fault.has_come:
            break
    assert number > least


def test_a_link_to_an_empty_folder_stays_one(model, whole, tmp_path):
    """Such as to another disk."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    quantize(model, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and tree(tmp_path / "elsewhere") == whole


def test_a_folder_that_is_filled_meanwhile_stays(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()

    def fill(stage, done, total):
        if stage == "fingerprint":
            (out / "mine.txt").write_text("precious")

    with pytest.raises(InputError, match="out exists and is not an empty folder"):
        quantize(model, out, progress=fill)
    assert tree(out) == {"mine.txt": b"precious"}


def test_a_job_in_a_folder_that_is_there_is_not_continued_unasked(model, whole, exported, tmp_path):
    out = tmp_path / "out"
    out.mkdir()

    def stop(stage, done, total):
        if (stage, done) == ("quantize", total):
            raise Stopped

    with pytest.raises(Stopped):
        quantize(model, out, progress=stop)
    assert [file.name for file in out.iterdir()] == [".partial"]
    with pytest.raises(CheckpointError, match="has neither"):
        duqpp.from_pretrained(out / ".partial")
    with pytest.raises(InputError, match=r"\.partial holds an unfinished job.*`resume=True`"):
        quantize(model, out)
    with pytest.raises(InputError, match=r"\.partial is in the way"):
        export_compressed_tensors(exported[0], out)
    quantize(model, out, resume=True)
    assert tree(out) == whole


def test_the_current_folder(model, whole, tmp_path, monkeypatch):
    for number, name in enumerate((".", "", "./")):
        here = tmp_path / str(number)
        here.mkdir()
        monkeypatch.chdir(here)
        quantize(model, name)
        assert tree(here) == whole


@pytest.mark.parametrize(
    "name",
    ["..", "/", "a" * 250, "a" * 300, "a/" * 3000, "\0", "\udcff", "file", "file/out", "model"],
    ids=["..", "root", "250", "300", "deep", "NUL", "bytes", "file", "below a file", "full"],
)
def test_what_is_no_output_is_an_error_of_one_line(name, model, exported, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("mine")
    damage.copy_of(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "here")
    before = tree(tmp_path)
    out = name if name in ("..", "/") else f"{tmp_path}/{name}"
    for run, source in ((quantize, model), (export_compressed_tensors, exported[0])):
        with pytest.raises(InputError, match=r"is not an empty folder|cannot write to"):
            run(source, out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS], ids=["permission", "read-only"])
def test_a_parent_that_cannot_be_written(error, model, exported, tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def refuse(self, *arguments, **options):
        if self.name == "out.partial":
            raise OSError(error, os.strerror(error))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    for run, source in ((quantize, model), (export_compressed_tensors, exported[0])):
        with pytest.raises(InputError, match=rf"cannot write to .*: {os.strerror(error)}$"):
            run(source, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_empty_folder_in_one_that_nobody_may_write(model, whole, tmp_path):
    out = tmp_path / "parent" / "out"
    out.mkdir(parents=True)
    out.parent.chmod(0o555)
    try:
        quantize(model, out)
    finally:
        out.parent.chmod(0o755)
    assert tree(out) == whole


def test_a_file_system_that_cannot_sync_folders(model, whole, tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(lock.os, "fsync", refuse)
    quantize(model, tmp_path / "out")
    assert tree(tmp_path / "out") == whole


ODD_NAMES = [
    "two  spaces",
    "it's",
    'say "so"',
    "[bold]red[/bold]",
    "new\nline",
    "tab\there ",
    "$HOME `x`",
    "-dash",
    "\u4f60\u597d",
    "l" * 200,
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_the_line_after_an_interruption_names_the_folder(
    name, model, whole, tmp_path, capsys, monkeypatch
):
    """As it is: the line is a command for a shell, and goes on where the job was."""
    monkeypatch.chdir(tmp_path)

    def interrupt(path: Path, *rest: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("duqpp.job.quantize.write_companions", interrupt)
        assert main(["quantize", "--method", "rtn", "--", str(model), name]) == 130
    _, errors = capsys.readouterr()
    words = shlex.split(errors.rpartition("with duqpp ")[2])
    assert words == ["quantize", "--method", "rtn", "--resume", "--", str(model), name]
    assert main(words) == 0
    assert tree(tmp_path / name) == whole
    assert "1 blocks resumed" in capsys.readouterr().out


def test_an_interruption_that_a_library_hides_is_one(model, tmp_path, capsys, monkeypatch):
    """torch may answer Ctrl-C with an error of its own, while a tensor is read."""
    tensor, before = SafetensorsSource.tensor, signal.getsignal(signal.SIGINT)

    def hide(self, name: str):
        if (tmp_path / "out.partial" / "model-00001-of-00002.json").exists():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape of object type") from None
        return tensor(self, name)

    monkeypatch.setattr(SafetensorsSource, "tensor", hide)
    assert main(["quantize", str(model), str(tmp_path / "out"), "--method", "rtn"]) == 130
    line = capsys.readouterr().err
    assert line.startswith("interrupted: go on at the last whole block with duqpp quantize")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_has_no_handler_of_its_own(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["--version"])))
    thread.start()
    thread.join(60)
    assert codes == [0]


def test_an_error_without_an_interruption_stays(model, tmp_path, monkeypatch):
    def fail(self, name: str):
        raise ValueError("own")

    monkeypatch.setattr(SafetensorsSource, "tensor", fail)
    with pytest.raises(ValueError, match="own"):
        main(["quantize", str(model), str(tmp_path / "out"), "--method", "rtn"])
