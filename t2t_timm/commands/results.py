"""What classify finds, written as text, JSON, CSV or Parquet, and kept while a long run goes on."""
import csv
import io
import json
import logging
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from ..errors import UserError, printable
from ..files import naming, new_file, new_text_file, sole_writer

_logger = logging.getLogger(__name__)

__all__ = ['SUFFIX', 'Journal', 'check_pyarrow', 'open_journal', 'write_file', 'write_results']

Result = dict[str, Any]

SUFFIX = '.incomplete'  # end of the name of the file that becomes the one to write
_ROWS = 4096  # images that are written to Parquet at a time


def write_results(results: Iterable[Result], form: str, file: TextIO) -> int:
    """Write results as they come, and what could not be read to stderr; return 1 if that was any, else 0.

    Args:
        results: What `classify` gives.
        form: 'text', 'json' or 'csv'. Text and CSV have control characters of names as escapes; JSON is ASCII.
        file: File to write to.
    """
    write, code, first = _WRITERS[form], 0, True
    for result in results:
        if 'error' in result:
            _tell(result)
            code = 1
            continue
        file.write(write(result, first))
        file.flush()
        first = False
    if form == 'json':
        file.write('[]\n' if first else '\n]\n')
    return code


def write_file(results: Iterable[Result], form: str, path: Path) -> None:
    """Write a file that appears whole or not at all.

    Args:
        results: What `classify` gives, without errors.
        form: 'text', 'json', 'csv' or 'parquet', which has a row for each image, its classes and embedding as lists.
        path: File to write.
    """
    if form == 'parquet':
        _write_parquet(results, path)
        return
    with new_text_file(path) as file:
        write_results(results, form, file)


def _tell(result: Result) -> None:
    print(f'{printable(result["image"])}: cannot be read: {printable(result["error"])}', file=sys.stderr)


def _text(result: Result, first: bool) -> str:
    lines = [f'  {100 * c["probability"]:5.1f} %  {c["label"]} ({c["index"]})' for c in result['classes']]
    return ''.join(f'{printable(line)}\n' for line in [result['image'], *lines])


def _json(result: Result, first: bool) -> str:
    text = json.dumps({key: value for key, value in result.items() if key != 'embedding'}, indent=2)
    if 'embedding' in result:  # in one line
        text = f'{text[:-2]},\n  "embedding": {json.dumps(result["embedding"])}\n}}'
    return ('[\n' if first else ',\n') + textwrap.indent(text, '  ')


def _csv(result: Result, first: bool) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    if first:
        writer.writerow(['image', 'rank', 'index', 'label', 'probability'])
    for rank, c in enumerate(result['classes'], 1):
        writer.writerow(
            [printable(result['image']), rank, c['index'], printable(c['label']), f'{c["probability"]:.6f}'])
    return text.getvalue()


_WRITERS = {'text': _text, 'json': _json, 'csv': _csv}


def check_pyarrow() -> None:
    """Raise a UserError if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as e:
        raise UserError('Parquet needs pyarrow: pip install pyarrow') from e


def _write_parquet(results: Iterable[Result], path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter
    results = iter(results)
    first = list(islice(results, 1))
    columns = [('image', pyarrow.string()), ('index', pyarrow.list_(pyarrow.int32())),
               ('label', pyarrow.list_(pyarrow.string())), ('probability', pyarrow.list_(pyarrow.float64()))]
    if first and 'embedding' in first[0]:
        columns.append(('embedding', pyarrow.list_(pyarrow.float32())))
    schema, results = pyarrow.schema(columns), chain(first, results)
    with new_file(path) as part, ParquetWriter(part, schema) as writer:
        while rows := [_row(result) for result in islice(results, _ROWS)]:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _row(result: Result) -> dict[str, Any]:
    name = result['image'].encode('utf-8', 'backslashreplace').decode()  # not every name of a file is UTF-8
    columns = {key: [c[key] for c in result['classes']] for key in ('index', 'label', 'probability')}
    return dict(image=name, **columns, embedding=result.get('embedding'))


class Journal:
    """Results in OUT.incomplete as they come, a line of JSON each, from which a run that was cut is continued.

    Images that could not be read are not kept: a continued run tries them again.

    Args:
        path: The file.
        options: What the results depend on, beside the images; it is the first line.
    """

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path = path
        self._head = json.dumps(options)
        self.done = self._read()

    def _read(self) -> list[str]:
        """Return the names of the images whose results are there; what a killed run wrote by half is cut off."""
        if not self.path.exists():
            return []
        done: list[str] = []
        with open(self.path, 'r+b') as file:
            head, end = file.readline(), file.tell()
            if head.endswith(b'\n') and head.decode(errors='replace').rstrip('\n') != self._head:
                raise UserError(
                    f'{self.path} holds results of other options, {head.decode(errors="replace").strip()}: repeat '
                    'those, or delete it to begin again.')
            for line in file:
                if not line.endswith(b'\n'):
                    break
                done.append(json.loads(line)['image'])
                end += len(line)
            file.truncate(end if head.endswith(b'\n') else 0)
        return done

    def add(self, results: Iterable[Result]) -> int:
        """Keep results as they come, and tell what could not be read; return 1 if that was any, else 0."""
        code = 0
        with naming(self.path, self.path), open(self.path, 'a', encoding='ascii', newline='\n') as file:
            if not file.tell():
                file.write(self._head + '\n')
            for result in results:
                if 'error' in result:
                    _tell(result)
                    code = 1
                    continue
                file.write(json.dumps(result) + '\n')
                file.flush()
                self.done.append(result['image'])
        return code

    def results(self) -> Iterator[Result]:
        """Give all results."""
        with open(self.path, encoding='ascii') as file:
            for line in islice(file, 1, None):
                yield json.loads(line)


@contextmanager
def open_journal(out: Path, options: dict[str, Any], resume: bool) -> Iterator[Journal]:
    """Give the journal of a file to write; it goes when the file has been written, and stays if anything fails.

    Raises:
        UserError: There is one already and `resume` is False, it is of other options, or another command writes it.
    """
    path = out.with_name(out.name + SUFFIX)
    with sole_writer(out):
        if not resume and _has_results(path):
            raise UserError(
                f'{path} holds results of a run that was cut: add --resume to go on, or delete it to begin again.')
        if not resume:
            path.unlink(missing_ok=True)
        journal = Journal(path, options)
        try:
            yield journal
        except BaseException:
            if journal.done:
                _logger.warning(
                    f'{len(journal.done):,} results are kept in {path}: the same command with --resume goes on.')
            else:
                path.unlink(missing_ok=True)
            raise
        os.unlink(path)


def _has_results(path: Path) -> bool:
    if not path.exists():
        return False
    with open(path, 'rb') as file:
        return len(list(islice(file, 2))) == 2
