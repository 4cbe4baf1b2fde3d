import errno
import os
import pickle
import subprocess
import sys

import pytest
from torch.utils.data import DataLoader, Dataset

from shared_utils.errors import InputError, Interrupted, MissingFileError, near_miss, run_main


def test_an_error_is_worded_from_its_four_parts():
    error = InputError("optim.lr", -1, "more than 0", "correct it")
    assert str(error) == "optim.lr: got -1, expected more than 0; correct it"
    assert error.field == "optim.lr"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  ", "\x0b", "\u2028"])
def test_an_error_is_one_line_whatever_its_parts_hold(end):
    error = InputError("name", f"two{end}lines", f"one{end}line", f"remove{end}it")
    assert str(error) == "name: got two lines, expected one line; remove it"


def test_an_error_keeps_spaces_within_a_path():
    assert "my  photos/a b.png" in str(InputError("image", "my  photos/a b.png", "a", "b"))


def test_a_missing_file_is_both_kinds_of_error():
    error = MissingFileError("data", "no such folder", "images", "check the path")
    assert isinstance(error, InputError)
    assert isinstance(error, FileNotFoundError)
    assert str(error) == "data: got no such folder, expected images; check the path"


@pytest.mark.parametrize("kind", [InputError, MissingFileError])
def test_an_error_survives_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("a: b", "c", "d", "e")))
    assert type(error) is kind
    assert str(error) == "a: b: got c, expected d; e"
    assert error.field == "a: b"


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise OSError("cause")
        except OSError as error:
            raise MissingFileError("a.png", "no file", "an image", "look") from error


def test_an_error_of_a_loader_worker_arrives_as_its_one_line():
    with pytest.raises(MissingFileError) as caught:
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert str(caught.value) == "a.png: got no file, expected an image; look"


@pytest.mark.parametrize("word", ["lrr", "l", "lr_"])
def test_near_miss_names_the_closest(word):
    assert near_miss(word, ["lr", "epochs", "weight_decay"]) == "did you mean 'lr'?"


def test_near_miss_lists_what_there_is_but_not_all_of_a_long_list():
    assert near_miss("zzz", ["b", "a"]) == "there are a, b"
    assert near_miss("zzz", [f"n{i:02}" for i in range(14)]).endswith("n10, n11 and 2 more")


def run(error, capsys):
    def body():
        if error is not None:
            raise error

    status = run_main(body)
    said = capsys.readouterr()
    assert said.out == ""
    return status, said.err


def test_done_is_0(capsys):
    assert run(None, capsys) == (0, "")


def test_wrong_input_is_2_and_one_line(capsys):
    status, said = run(InputError("a", "x\ny", "b", "c"), capsys)
    assert (status, said) == (2, "error: a: got x y, expected b; c\n")


def test_an_interrupt_is_130_and_says_how_to_go_on(capsys):
    status, said = run(Interrupted("e2vpt train --resume runs/x"), capsys)
    assert status == 130
    assert said.splitlines()[-1].endswith("go on with: e2vpt train --resume runs/x")
    status, said = run(KeyboardInterrupt(), capsys)
    assert status == 130
    assert "state saved" not in said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_2(number, capsys):
    status, said = run(OSError(number, os.strerror(number)), capsys)
    assert status == 2
    assert said.startswith("error: disk: got ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("bug", [ValueError("bug"), OSError(errno.EIO, "bug"), KeyError("bug")])
def test_a_bug_keeps_its_traceback(bug):
    def body():
        raise bug

    with pytest.raises(type(bug), match="bug"):
        run_main(body)


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import sys; from shared_utils.errors import run_main\n"
        "sys.exit(run_main(lambda: [print('x' * 1000, flush=True) for _ in range(1000)]))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
