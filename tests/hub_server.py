"""Loopback stand-ins for the Hub, its storage and a release host, with faults to order."""
import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse


@dataclass
class Fault:
    """What goes wrong with an answer: one of these, for the next `times` requests."""
    status: int | None = None  # answer with this code
    drop: int | None = None  # close the connection after so many bytes of the body
    short: int | None = None  # serve only so many bytes, and say that they are all
    stall: int | None = None  # stop sending after so many bytes, until the client or the server goes away
    body: bytes | None = None  # serve these bytes instead
    methods: tuple[str, ...] = ('GET',)
    times: int = 1


class LoopbackServer(ThreadingHTTPServer):
    """A server on a free port of 127.0.0.1 in threads of its own, with a record of its requests."""
    daemon_threads = True

    def __init__(self, handler) -> None:
        super().__init__(('127.0.0.1', 0), handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.lock = threading.Lock()  # of the faults' counts
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[tuple[str, str, str | None, int]] = []  # method, path, Range, status
        self.stalled = threading.Semaphore(0)
        self.closing = threading.Event()

    def take_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            for fault in self.faults.get(path, []):
                if fault.times > 0 and method in fault.methods:
                    fault.times -= 1
                    return fault
        return Fault()

    def seen(self, path: str, method: str = 'GET') -> list[tuple[str | None, int]]:
        """Return (Range, status) of the requests for a path."""
        return [(r, status) for m, p, r, status in self.requests if m == method and p == path]

    @contextlib.contextmanager
    def running(self) -> Iterator['LoopbackServer']:
        thread = threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.closing.set()
            self.shutdown()
            self.server_close()
            thread.join()

    def handle_error(self, request, client_address) -> None:
        """Say nothing of clients that go away; a test that expects an answer sees that it is missing."""


class LoopbackHandler(BaseHTTPRequestHandler):
    """What all servers share: bodies, faults, the record of requests."""
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # else a body waits 40 ms until the client has acknowledged the header

    def log_message(self, *args) -> None:
        """Keep the test's output clean."""

    def body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') == 'chunked':
            data = b''
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def answer(self, status: int, data: bytes = b'', headers: dict[str, str] | None = None) -> None:
        path = urlparse(self.path).path
        self.server.requests.append((self.command, path, self.headers.get('Range'), status))
        self.send_response(status)
        for k, v in {'Content-Length': str(len(data)), **(headers or {})}.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def answer_json(self, value, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {'Content-Type': 'application/json'})

    def stall(self) -> None:
        """Send nothing more until the server goes away."""
        self.wfile.flush()
        self.server.stalled.release()
        self.server.closing.wait(60)
        self.close_connection = True

    def answers_fault(self, path: str) -> bool:
        """Stall or answer with a status if that was ordered; return whether it was."""
        fault = self.server.take_fault(self.command, path)
        if fault.stall is not None:
            self.stall()
        elif fault.status is not None:
            self.answer(fault.status)
        return (fault.stall, fault.status) != (None, None)

    def answer_file(self, data: bytes, fault: Fault) -> None:
        """Serve bytes, or the range of them that was asked for, with a fault."""
        data = (data if fault.body is None else fault.body)[:fault.short]
        start, headers = 0, {}
        if asked := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or ''):
            start = int(asked[1])
            if start >= len(data):
                return self.answer(416, headers={'Content-Range': f'bytes */{len(data)}'})
            headers['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        headers['Content-Length'] = str(len(data) - start)
        stop = fault.drop if fault.stall is None else fault.stall
        self.answer(206 if asked else 200, data[start:stop], headers)
        if fault.stall is not None:
            self.stall()
        if stop is not None:
            self.close_connection = True


class FileHandler(LoopbackHandler):
    """Files by path: GET with ranges, PUT to store, redirects."""

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        fault = self.server.take_fault('GET', path)
        if fault.status is not None:
            return self.answer(fault.status)
        if path in self.server.redirects:
            return self.answer(302, headers={'Location': self.server.redirects[path]})
        if path not in self.server.files:
            return self.answer(404)
        self.answer_file(self.server.files[path], fault)

    def do_PUT(self) -> None:
        self.server.files[urlparse(self.path).path] = self.body()
        self.answer(200, headers={'ETag': '"part"'})


class FileServer(LoopbackServer):
    """A host of files: the Hub's storage, or a publisher's release host."""

    def __init__(self) -> None:
        super().__init__(FileHandler)
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}


@dataclass
class Repo:
    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False
    commits: int = 1

    @property
    def commit(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith('.safetensors')


def oid(name: str, data: bytes) -> str:
    """The Hub's name of a file's content: SHA-256 of a large file, git's blob hash of another."""
    return hashlib.sha256(data).hexdigest() if is_lfs(name) else (
        hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest())


class HubHandler(LoopbackHandler):
    """The Hub's routes for downloading files of models and for committing to them."""

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, headers={'X-Error-Code': code, 'X-Error-Message': message})

    def find_repo(self, name: str) -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None:  # an anonymous client may not know whether it is private or missing
            self.refuse(404 if self.headers.get('Authorization') else 401, 'RepoNotFound', 'Repository not found')
        return repo

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        if self.answers_fault(path):
            return
        if found := re.fullmatch(r'/api/models/([^/]+/[^/]+)(/revision/main)?', path):
            if repo := self.find_repo(found[1]):
                files = [{'rfilename': name} for name in repo.files]
                self.answer_json({'id': found[1], 'modelId': found[1], 'sha': repo.commit, 'siblings': files})
            return
        found = re.fullmatch(r'/([^/]+/[^/]+)/resolve/main/(.+)', path)
        if not found:
            return self.answer(404)
        if repo := self.find_repo(found[1]):
            self.resolve(repo, found[2])

    do_HEAD = do_GET

    def resolve(self, repo: Repo, name: str) -> None:
        if repo.gated:
            return self.refuse(403, 'GatedRepo', 'Access to this model is restricted.')
        if name not in repo.files:
            return self.refuse(404, 'EntryNotFound', 'Entry not found')
        data = repo.files[name]
        etag = oid(name, data)
        headers = {'X-Repo-Commit': repo.commit, 'ETag': f'"{etag}"'}
        if not is_lfs(name):
            return self.answer(200, data, headers)
        self.server.storage.files.setdefault(f'/{etag}', data)
        self.answer(302, headers=headers | {
            'X-Linked-Etag': f'"{etag}"',
            'X-Linked-Size': str(len(data)),
            'Location': f'{self.server.storage.url}/{etag}',
        })

    def do_POST(self) -> None:
        path = urlparse(self.path).path
        data = self.body()
        if self.answers_fault(path):
            return
        if path == '/api/validate-yaml':
            return self.answer_json({})
        if not self.headers.get('Authorization'):
            return self.refuse(401, '', 'Invalid username or password.')
        if path == '/api/repos/create':
            return self.create(json.loads(data))
        if found := re.fullmatch(r'/api/models/([^/]+/[^/]+)/preupload/main', path):
            return self.preupload(found[1], json.loads(data))
        if found := re.fullmatch(r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', path):
            return self.lfs_batch(json.loads(data))
        if found := re.fullmatch(r'/api/models/([^/]+/[^/]+)/commit/main', path):
            return self.commit(found[1], [json.loads(line) for line in data.splitlines()])
        self.answer(404)

    def create(self, request: dict[str, str]) -> None:
        name = f'{request["organization"]}/{request["name"]}'
        status = 409 if name in self.server.repos else 200
        self.server.repos.setdefault(name, Repo({'.gitattributes': b'*.safetensors filter=lfs\n'}))
        self.answer_json({'url': f'{self.server.url}/{name}'}, status)

    def preupload(self, name: str, request: dict[str, list]) -> None:
        if repo := self.find_repo(name):
            names = [f['path'] for f in request['files']]
            self.answer_json({'files': [dict(
                path=name, uploadMode='lfs' if is_lfs(name) else 'regular', shouldIgnore=False,
                oid=oid(name, repo.files[name]) if name in repo.files else None) for name in names]})

    def lfs_batch(self, request: dict[str, list]) -> None:
        objects = []
        for item in request['objects']:
            path = f'/{item["oid"]}'
            upload = {'actions': {'upload': {'href': self.server.storage.url + path}}}
            objects.append(item if path in self.server.storage.files else item | upload)
        self.answer_json({'transfer': 'basic', 'objects': objects})

    def commit(self, name: str, lines: list[dict[str, dict]]) -> None:
        repo = self.server.repos[name]
        for line in lines:
            value = line['value']
            if line['key'] == 'file':
                repo.files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                repo.files[value['path']] = self.server.storage.files[f'/{value["oid"]}']
        repo.commits += 1
        self.answer_json({'commitUrl': f'{self.server.url}/{name}/commit/{repo.commit}', 'commitOid': repo.commit})


class HubServer(LoopbackServer):
    """A Hub whose large files lie on a storage host of its own."""

    def __init__(self, storage: FileServer) -> None:
        super().__init__(HubHandler)
        self.storage = storage
        self.repos: dict[str, Repo] = {}
