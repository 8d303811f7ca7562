"""What classify finds, written as text, JSON, CSV or Parquet, and kept while a long run goes on."""
import csv
import json
import logging
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from ..errors import UserError, printable
from ..files import naming, new_file, new_text_file, sole_writer

_logger = logging.getLogger(__name__)

__all__ = ['tell_errors', 'write_results', 'write_resumable']

Result = dict[str, Any]

ROWS = 4096  # images that are written to Parquet at a time


def tell_errors(results: Iterable[Result], failed: list[str]) -> Iterator[Result]:
    """Give the results of the files that could be read; tell of the others on stderr, and add their names to a list."""
    for result in results:
        if 'error' in result:
            failed.append(result['image'])
            print(f'{printable(result["image"])}: cannot be read: {printable(result["error"])}', file=sys.stderr)
        else:
            yield result


def write_results(results: Iterable[Result], form: str, out: Path | None = None) -> None:
    """Write results as they come to standard output, or to a file that appears whole or not at all.

    Args:
        results: What `classify` gives, without errors.
        form: 'text', 'json', 'csv' or, for a file, 'parquet', which has a row for each image, its classes and embedding
            as lists. Text and CSV have control characters of names as escapes; JSON is ASCII.
        out: File to write; None prints them.
    """
    if form == 'parquet':
        assert out is not None  # as the command line says
        _write_parquet(results, out)
        return
    with nullcontext(sys.stdout) if out is None else new_text_file(out) as file:
        for text in {'text': _text, 'json': _json, 'csv': _csv}[form](results):
            file.write(text)
            file.flush()


def _text(results: Iterable[Result]) -> Iterator[str]:
    for result in results:
        lines = [f'  {100 * c["probability"]:5.1f} %  {c["label"]} ({c["index"]})' for c in result['classes']]
        yield ''.join(f'{printable(line)}\n' for line in [result['image'], *lines])


def _json(results: Iterable[Result]) -> Iterator[str]:
    before = '['
    for result in results:
        text = json.dumps({key: value for key, value in result.items() if key != 'embedding'}, indent=2)
        if 'embedding' in result:  # in one line
            text = f'{text[:-2]},\n  "embedding": {json.dumps(result["embedding"])}\n}}'
        yield f'{before}\n{textwrap.indent(text, "  ")}'
        before = ','
    yield '[]\n' if before == '[' else '\n]\n'


def _csv(results: Iterable[Result]) -> Iterator[str]:
    line = csv.writer(SimpleNamespace(write=str), lineterminator='\n').writerow  # gives what `write` gives
    yield line(['image', 'rank', 'index', 'label', 'probability'])
    for result in results:
        for rank, c in enumerate(result['classes'], 1):
            yield line([printable(result['image']), rank, c['index'], printable(c['label']), f'{c["probability"]:.6f}'])


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
        while rows := [_row(result) for result in islice(results, ROWS)]:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _row(result: Result) -> dict[str, Any]:
    name = result['image'].encode('utf-8', 'backslashreplace').decode()  # not every name of a file is UTF-8
    columns = {key: [c[key] for c in result['classes']] for key in ('index', 'label', 'probability')}
    return dict(image=name, **columns, embedding=result.get('embedding'))


def write_resumable(
        run: Callable[[list[str]], Iterable[Result]],
        form: str,
        out: Path,
        options: dict[str, str],
        resume: bool,
) -> None:
    """Write results to a file, and keep them in OUT.incomplete meanwhile, from which a run that was cut is continued.

    OUT.incomplete has the options in the first line, and then a line of JSON for each result. It goes when the file has
    been written, and stays if anything fails. Images that could not be read are tried again.

    Args:
        run: Gives the results of all images but those of a list, without errors.
        form: What `write_results` takes.
        options: What the results depend on, beside the images.

    Raises:
        UserError: There are results already and `resume` is False, or they are of other options, or another command
            writes the file.
    """
    path = out.with_name(out.name + '.incomplete')
    with sole_writer(out):
        with naming(path, path), open(path, 'a+b') as journal:
            done = _read_journal(journal, path, options, resume)
        try:
            with naming(path, path), open(path, 'a', encoding='ascii', newline='\n') as file:
                if not done:
                    file.write(json.dumps(options) + '\n')
                for result in run(done):
                    file.write(json.dumps(result) + '\n')
                    file.flush()
                    done.append(result['image'])
            with open(path, encoding='ascii') as file:
                write_results(map(json.loads, islice(file, 1, None)), form, out)
        except BaseException:
            if done:
                _logger.warning(f'{len(done):,} results are kept in {path}: the same command with --resume goes on.')
            else:
                path.unlink()
            raise
        path.unlink()


def _read_journal(file: BinaryIO, path: Path, options: dict[str, str], resume: bool) -> list[str]:
    """Return the images whose results are there; cut off what a killed run has written by half."""
    done = []
    file.seek(0)
    head, end = file.readline(), file.tell()
    try:
        for line in file:
            if line.endswith(b'\n'):
                done.append(json.loads(line)['image'])
                end += len(line)
        kept = json.loads(head) if done else options
    except (ValueError, LookupError, TypeError) as e:
        raise UserError(f'{path} is damaged: delete it to begin again.') from e
    if done and not resume:
        raise UserError(
            f'{path} holds results of a run that was cut: add --resume to go on, or delete it to begin again.')
    if kept != options:
        raise UserError(
            f'{path} holds results of other options, {head.decode().strip()}: repeat those, or delete it to begin '
            'again.')
    file.truncate(end if done else 0)
    return done
