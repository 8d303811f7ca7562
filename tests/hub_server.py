"""Loopback stand-ins for the Hub, its storage and a release host, with faults to order."""
import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Dict, Iterator, List, Optional, Tuple
from urllib.parse import urlparse


@dataclass
class Fault:
    """What goes wrong with an answer: one of these, for the next `times` requests."""
    status: Optional[int] = None  # answer with this code
    drop: Optional[int] = None  # close the connection after so many bytes of the body
    short: Optional[int] = None  # serve only so many bytes, and say that they are all
    stall: Optional[int] = None  # stop sending after so many bytes, until the client or the server goes away
    body: Optional[bytes] = None  # serve these bytes instead
    methods: Tuple[str, ...] = ('GET',)
    times: int = 1


class LoopbackServer(ThreadingHTTPServer):
    """A server on a free port of 127.0.0.1 in threads of its own, with a record of its requests."""
    daemon_threads = True

    def __init__(self, handler) -> None:
        super().__init__(('127.0.0.1', 0), handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.lock = threading.Lock()
        self.faults: Dict[str, List[Fault]] = {}
        self.requests: List[Tuple[str, str, Optional[str], int]] = []  # method, path, Range, status
        self.stalled = threading.Semaphore(0)
        self.closing = threading.Event()

    def take_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            for fault in self.faults.get(path, []):
                if fault.times > 0 and method in fault.methods:
                    fault.times -= 1
                    return fault
        return Fault()

    def heal(self, paths: List[str]) -> None:
        with self.lock:
            for path in paths:
                self.faults.pop(path, None)

    def seen(self, path: str, method: str = 'GET') -> List[Tuple[Optional[str], int]]:
        """Return (Range, status) of the requests for a path."""
        with self.lock:
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

    def record(self, status: int) -> None:
        with self.server.lock:
            path = urlparse(self.path).path
            self.server.requests.append((self.command, path, self.headers.get('Range'), status))

    def answer(self, status: int, data: bytes = b'', headers: Optional[Dict[str, str]] = None) -> None:
        self.record(status)
        self.send_response(status)
        for k, v in (headers or {}).items():
            self.send_header(k, v)
        if 'Content-Length' not in (headers or {}):
            self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def answer_json(self, value, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {'Content-Type': 'application/json'})

    def held(self, fault: Fault) -> bool:
        """Answer nothing and do nothing, for a fault that stalls, until the server goes away; return whether it did."""
        if fault.stall is None:
            return False
        self.close_connection = True
        self.server.stalled.release()
        self.server.closing.wait(60)
        return True

    def answer_file(self, data: bytes, fault: Fault) -> None:
        """Serve bytes, or the range of them that was asked for, with a fault."""
        data = data if fault.body is None else fault.body
        data = data if fault.short is None else data[:fault.short]
        total, start = len(data), 0
        if asked := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or ''):
            start = int(asked[1])
            if start >= total:
                return self.answer(416, headers={'Content-Range': f'bytes */{total}'})
        self.record(206 if asked else 200)
        self.send_response(206 if asked else 200)
        self.send_header('Content-Length', str(total - start))
        if asked:
            self.send_header('Content-Range', f'bytes {start}-{total - 1}/{total}')
        self.end_headers()
        stop = next((n for n in (fault.drop, fault.stall) if n is not None), None)
        self.wfile.write(data[start:] if stop is None else data[start:stop])
        if fault.stall is not None:
            self.wfile.flush()
            self.server.stalled.release()
            self.server.closing.wait(60)
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
        data = self.body()
        path = urlparse(self.path).path
        self.server.files[path] = data
        self.answer(200, headers={'ETag': '"part"'})


class FileServer(LoopbackServer):
    """A host of files: the Hub's storage, or a publisher's release host."""

    def __init__(self) -> None:
        super().__init__(FileHandler)
        self.files: Dict[str, bytes] = {}
        self.redirects: Dict[str, str] = {}


@dataclass
class Repo:
    files: Dict[str, bytes] = field(default_factory=dict)
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

    def refuse(self, status: int, code: Optional[str], message: str) -> None:
        headers = {'X-Error-Message': message}
        if code:
            headers['X-Error-Code'] = code
        self.answer(status, headers=headers)

    def find_repo(self, name: str) -> Optional[Repo]:
        repo = self.server.repos.get(name)
        if repo is None:  # an anonymous client may not know whether it is private or missing
            self.refuse(404 if self.headers.get('Authorization') else 401, 'RepoNotFound', 'Repository not found')
        return repo

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        fault = self.server.take_fault(self.command, path)
        if self.held(fault):
            return
        if fault.status is not None:
            return self.answer(fault.status)
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

    def resolve(self, repo: Repo, name: str) -> None:
        if repo.gated:
            return self.refuse(403, 'GatedRepo', 'Access to this model is restricted.')
        if name not in repo.files:
            return self.refuse(404, 'EntryNotFound', 'Entry not found')
        data = repo.files[name]
        headers = {'X-Repo-Commit': repo.commit, 'ETag': f'"{oid(name, data)}"'}
        if not is_lfs(name):
            return self.answer(200, data, headers)
        path = f'/{oid(name, data)}'
        self.server.storage.files.setdefault(path, data)
        headers.update({
            'X-Linked-Etag': f'"{oid(name, data)}"',
            'X-Linked-Size': str(len(data)),
            'Location': self.server.storage.url + path,
        })
        self.answer(302, headers=headers)

    def do_POST(self) -> None:
        path = urlparse(self.path).path
        data = self.body()
        if path == '/control/heal':
            for server in (self.server, *self.server.others):
                server.heal(json.loads(data))
            return self.answer(200)
        fault = self.server.take_fault('POST', path)
        if self.held(fault):
            return
        if fault.status is not None:
            return self.refuse(fault.status, None, 'You may not.')
        if path == '/api/validate-yaml':
            return self.answer_json({})
        if not (self.headers.get('Authorization') or path.startswith('/verify')):
            return self.refuse(401, None, 'Invalid username or password.')
        if path == '/api/repos/create':
            return self.create(json.loads(data))
        if found := re.fullmatch(r'/api/models/([^/]+/[^/]+)/preupload/main', path):
            return self.preupload(found[1], json.loads(data))
        if found := re.fullmatch(r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', path):
            return self.lfs_batch(json.loads(data))
        if found := re.fullmatch(r'/verify/([0-9a-f]{64})', path):
            stored = self.server.storage.files[f'/{found[1]}']
            return self.answer(200 if hashlib.sha256(stored).hexdigest() == found[1] else 422)
        if found := re.fullmatch(r'/api/models/([^/]+/[^/]+)/commit/main', path):
            return self.commit(found[1], [json.loads(line) for line in data.splitlines()])
        self.answer(404)

    def create(self, request: Dict[str, str]) -> None:
        name = f'{request["organization"]}/{request["name"]}'
        exists = name in self.server.repos
        if not exists:
            self.server.repos[name] = Repo({'.gitattributes': b'*.safetensors filter=lfs\n'})
        self.answer_json({'url': f'{self.server.url}/{name}'}, 409 if exists else 200)

    def preupload(self, name: str, request: Dict[str, list]) -> None:
        if repo := self.find_repo(name):
            self.answer_json({'files': [
                {
                    'path': f['path'],
                    'uploadMode': 'lfs' if is_lfs(f['path']) else 'regular',
                    'shouldIgnore': False,
                    'oid': oid(f['path'], repo.files[f['path']]) if f['path'] in repo.files else None,
                }
                for f in request['files']
            ]})

    def lfs_batch(self, request: Dict[str, list]) -> None:
        objects = []
        for item in request['objects']:
            path = f'/{item["oid"]}'
            objects.append(dict(item) if path in self.server.storage.files else dict(item, actions={
                'upload': {'href': self.server.storage.url + path},
                'verify': {'href': f'{self.server.url}/verify{path}'},
            }))
        self.answer_json({'transfer': 'basic', 'objects': objects})

    def commit(self, name: str, lines: List[Dict[str, dict]]) -> None:
        repo = self.find_repo(name)
        if repo is None:
            return
        for line in lines:
            value = line['value']
            if line['key'] == 'file':
                repo.files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                repo.files[value['path']] = self.server.storage.files[f'/{value["oid"]}']
        repo.commits += 1
        self.answer_json({'commitUrl': f'{self.server.url}/{name}/commit/{repo.commit}', 'commitOid': repo.commit})


class HubServer(LoopbackServer):
    """A Hub whose large files lie on a storage host of its own; /control/heal ends faults of all hosts."""

    def __init__(self, storage: FileServer, *others: FileServer) -> None:
        super().__init__(HubHandler)
        self.storage = storage
        self.others = (storage, *others)
        self.repos: Dict[str, Repo] = {}
