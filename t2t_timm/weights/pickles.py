"""Read untrusted pickles without creating the objects they name, in the time and memory that their size explains."""
import pickle
import struct
from collections.abc import Callable
from typing import IO, Any, ClassVar

__all__ = ['GuardedUnpickler', 'Inert', 'dry_run']

_COPIES = 4  # a file may copy this many times its size: texts become bytes, and bytes an array


class GuardedUnpickler(pickle._Unpickler):
    """Unpickler of files whose author may wish harm; subclasses say what find_class admits.

    Of pickle's two implementations the one in Python: the other allocates a table as long as the file says. It does so
    for a bytearray itself, so the override is needed. `size` is that of the whole file, in bytes.
    """
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    append: Callable[[Any], None]  # both set by load
    read: Callable[[int], bytes]

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(file, encoding='latin1')
        self.left = 1 << 20 | _COPIES * size

    def spend(self, value: Any) -> None:
        """Count a copy of a value, and raise when all are too large: a short file can ask for a long one repeatedly."""
        self.left -= len(value) if hasattr(type(value), '__len__') else 0
        if self.left < 0:
            raise pickle.UnpicklingError('it unpacks to more than its size explains')

    def load_bytearray8(self) -> None:
        """Read as many bytes as there are, at most as many as the file says."""
        self.append(bytearray(self.read(*struct.unpack('<Q', self.read(8)))))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


class Inert(dict):
    """Stands for an object that is not needed: takes whatever a pickle does to it, and does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # may stand for a key

    def __init__(self, *args: Any) -> None:
        pass

    __setstate__ = append = extend = __init__


class _DryUnpickler(GuardedUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        def new(cls: type, *args: Any) -> Inert:
            for value in args:
                self.spend(value)
            return Inert.__new__(cls)

        return type(name, (Inert,), {'__new__': new})

    def persistent_load(self, pid: Any) -> Inert:
        return Inert()


def dry_run(file: IO[bytes], size: int, count: int) -> None:
    """Read `count` pickles of a file of `size` bytes, making nothing of them, before another unpickler does.

    torch's own puts what cannot be called into its error as text, which a dict of the same dict twice, and so on, can
    make endless; and it copies a list as often as a file asks. A damaged pickle raises nearly any exception.
    """
    for _ in range(count):
        _DryUnpickler(file, size).load()
