import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from steadyhelm.data.code_ref import call_code, code_function, iterate_result, load_code, wrong_result
from steadyhelm.errors import ConfigError, DataError


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return folder


def test_a_name_beside_the_run_file_is_loaded(tmp_path):
    write(tmp_path, task="answer = 42")
    assert load_code(tmp_path, "task.py:answer") == 42


def test_a_file_in_a_sub_folder_is_loaded(tmp_path):
    (tmp_path / "code").mkdir()
    write(tmp_path / "code", deep="answer = 43")
    assert load_code(tmp_path, "code/deep.py:answer") == 43


def test_a_module_is_loaded_once_under_a_name_of_its_own(tmp_path):
    write(tmp_path, once="class Thing: pass")
    first = load_code(tmp_path, "once.py:Thing")
    assert load_code(tmp_path, "once.py:Thing") is first
    assert first.__module__.startswith("steadyhelm_task_")
    assert first.__module__.endswith("_once")


def test_task_files_import_each_other_and_share_one_module(tmp_path):
    write(tmp_path, shapes="class Shape: pass", maker="from shapes import Shape\ndef make(): return Shape()")
    assert type(call_code(tmp_path, "maker.py:make")) is load_code(tmp_path, "shapes.py:Shape")


def test_a_module_loaded_by_reference_first_is_the_one_that_siblings_import(tmp_path):
    write(tmp_path, colours="class Colour: pass", painter="from colours import Colour\ndef make(): return Colour()")
    colour = load_code(tmp_path, "colours.py:Colour")
    assert type(call_code(tmp_path, "painter.py:make")) is colour


def test_equally_named_files_of_two_tasks_do_not_meet(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, part=f"value = {name!r}", whole="import part\ndef value(): return part.value")
    assert call_code(tmp_path / "a", "whole.py:value") == "a"
    assert call_code(tmp_path / "b", "whole.py:value") == "b"
    assert call_code(tmp_path / "a", "whole.py:value") == "a"


def test_a_file_named_like_a_standard_module_leaves_that_module_alone(tmp_path):
    import json

    write(tmp_path, json="value = 7")
    assert load_code(tmp_path, "json.py:value") == 7
    assert sys.modules["json"] is json


def test_a_missing_file_is_named_with_its_whole_path(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.py:f: there is no file .*/gone\.py; give the file's path"):
        load_code(tmp_path, "gone.py:f")


def test_a_missing_name_is_answered_with_the_names_there_are(tmp_path):
    write(tmp_path, named="def train_pairs(): ...\n_hidden = 1")
    with pytest.raises(ConfigError, match=r"named\.py has no name 'train_pair'; it defines train_pairs$"):
        load_code(tmp_path, "named.py:train_pair")


def test_an_import_error_names_the_users_line(tmp_path):
    write(tmp_path, needy="x = 1\n\nimport no_such_module_here\n")
    with pytest.raises(ConfigError, match=r"failed at needy\.py line 3: ModuleNotFoundError: No module named"):
        load_code(tmp_path, "needy.py:x")


def test_an_error_in_a_sibling_names_the_siblings_line(tmp_path):
    write(tmp_path, outer="import inner_broken\nx = 1", inner_broken="\n1 / 0")
    with pytest.raises(ConfigError, match=r"outer\.py:x: .* failed at inner_broken\.py line 2: ZeroDivisionError"):
        load_code(tmp_path, "outer.py:x")


def test_a_syntax_error_names_its_line(tmp_path):
    write(tmp_path, typo="x = 1\ndef f(:\n")
    with pytest.raises(ConfigError, match=r"typo\.py line 2: SyntaxError"):
        load_code(tmp_path, "typo.py:x")


def test_a_file_that_exits_on_import_does_not_end_the_process(tmp_path):
    write(tmp_path, script="import sys\nsys.exit(3)")
    with pytest.raises(ConfigError, match=r"script\.py line 2: SystemExit: 3"):
        load_code(tmp_path, "script.py:x")


def test_a_file_that_failed_can_be_loaded_after_it_was_mended(tmp_path):
    write(tmp_path, mended="1 / 0")
    with pytest.raises(ConfigError):
        load_code(tmp_path, "mended.py:x")
    write(tmp_path, mended="x = 'a whole new file'")
    assert load_code(tmp_path, "mended.py:x") == "a whole new file"


def test_a_failing_call_names_the_users_line(tmp_path):
    write(tmp_path, calls="def f(n):\n    return [1][n]")
    assert call_code(tmp_path, "calls.py:f", 0) == 1
    with pytest.raises(ConfigError, match=r"the call failed at calls\.py line 2: IndexError"):
        call_code(tmp_path, "calls.py:f", 5)


def test_our_own_errors_pass_through_a_call(tmp_path):
    write(tmp_path, own="from steadyhelm.errors import DataError\ndef f(): raise DataError('image 3 is torn')")
    with pytest.raises(DataError, match=r"^image 3 is torn$"):
        call_code(tmp_path, "own.py:f")


def test_something_that_cannot_be_called_is_refused(tmp_path):
    write(tmp_path, plain="pairs = [1]")
    with pytest.raises(ConfigError, match=r"plain\.py:pairs: \[1\] is not a function"):
        code_function(tmp_path, "plain.py:pairs")


def test_an_error_while_records_are_read_names_the_users_line(tmp_path):
    write(tmp_path, lazy="def f():\n    yield 1\n    yield {}['k']")
    items = iterate_result(tmp_path, "lazy.py:f", call_code(tmp_path, "lazy.py:f"))
    assert next(items) == 1
    with pytest.raises(ConfigError, match=r"reading its records failed at lazy\.py line 3: KeyError"):
        next(items)


def test_a_result_that_is_no_sequence_is_refused_with_its_value(tmp_path):
    with pytest.raises(ConfigError, match=r"t\.py:f: it returned None \(NoneType\); it must return a sequence"):
        next(iterate_result(tmp_path, "t.py:f", None))
    assert str(wrong_result("t.py:f", "a string", "x" * 500)).startswith("t.py:f: it returned 'xxx")
    assert len(str(wrong_result("t.py:f", "a string", "x" * 500))) < 150


def test_the_package_needs_neither_torch_nor_ray():
    modules = (
        "steadyhelm.data.code_ref, steadyhelm.data.cursor, steadyhelm.data.pairs, steadyhelm.data.template, "
        "steadyhelm.rewards.scoring, steadyhelm.rewards.workers, steadyhelm.evaluation, "
        "steadyhelm.services.prompts, steadyhelm.services.reward"
    )
    code = f"import sys, {modules}; print([m for m in ('torch', 'ray', 'transformers', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
