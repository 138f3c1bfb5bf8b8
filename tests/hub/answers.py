"""How the test Hub (server.py) answers: connections, bodies, faults."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import socketserver
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.faults import Corrupt, Cut, Fault, Slow, Stall, Status, WrongLength
from tests.hub.repos import Blob, Content

if TYPE_CHECKING:
    from tests.hub.server import HubServer

CHUNK = 1 << 20
#: Steps a second of a slow answer.
STEPS = 20


class Listener(socketserver.ThreadingTCPServer):
    """One origin of the server, with a daemon thread a connection."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: HubServer, cdn: bool) -> None:
        self.hub, self.cdn = hub, cdn
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer one connection in a thread, known for the time that it is open."""
        given = (request, client_address)
        thread = threading.Thread(target=self.process_request_thread, args=given, daemon=True)
        with self._lock:
            self._open[request] = thread
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """What the thread does."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._open[request]

    def stop(self) -> None:
        """Close all connections and wait for their threads."""
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self._lock:
            connections = dict(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in connections.values():
            thread.join(5)


class Refusal(Exception):
    """An answer with an error status, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        self.status, self.message = status, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.headers["X-Error-Message"] = message
        if code:
            self.headers["X-Error-Code"] = code


class Handler(BaseHTTPRequestHandler):
    """One connection; `server` is its Listener."""

    server: Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        """All requests of a connection, until one side closes it."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:  # noqa: N802
        from tests.hub.routes import route  # it builds on this module

        self.hub = self.server.hub
        path = urlsplit(self.path)
        self.parts = [unquote(part) for part in path.path.strip("/").split("/")]
        self.query = {name: values[-1] for name, values in parse_qs(path.query).items()}
        self.request_log = self.hub.begin(self.command, self.path, self.headers.get("Range"))
        self._asked_fault, self._fault = False, None
        try:
            try:
                route(self)
            except Refusal as refusal:
                self.drain()
                self.json({"error": refusal.message}, refusal.status, **refusal.headers)
        finally:
            self.hub.end(self.request_log)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def fault(self, nbytes: int) -> Fault | None:
        """What is to go wrong with this request; a status that is to be answered is raised."""
        if self._asked_fault:
            return self._fault
        self._asked_fault = True
        self.request_log.nbytes = nbytes
        self._fault = self.hub.fault(self.request_log)
        if isinstance(self._fault, Status):
            after, reset = self._fault.retry_after, self._fault.reset
            headers = {} if after is None else {"Retry_After": str(after)}
            headers |= {} if reset is None else {"RateLimit": f'"api";r=0;t={reset}'}
            raise Refusal(self._fault.code, "told to fail", **headers)
        return self._fault

    # What comes in.

    def chunks(self) -> Iterator[bytes]:
        """The request's body, once."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            del self.headers["Transfer-Encoding"]
            return
        left = int(self.headers.get("Content-Length") or 0)
        del self.headers["Content-Length"]
        while left:
            data = self.rfile.read(min(left, CHUNK))
            if not data:
                raise ConnectionError
            left -= len(data)
            yield data

    def drain(self) -> None:
        """Read what is left of the request, so that the connection can serve the next one."""
        for _ in self.chunks():
            pass

    def body(self) -> bytes:
        """The whole request's body; the fault is asked for before."""
        self.fault(int(self.headers.get("Content-Length") or 0))
        return b"".join(self.chunks())

    def upload(self, write: Callable[[bytes], object]) -> None:
        """Take a file; a cut goes through the middle of it."""
        fault, taken = self.fault(int(self.headers.get("Content-Length") or 0)), 0
        for data in self.chunks():
            write(data)
            taken += len(data)
            if isinstance(fault, Cut) and taken >= fault.after_bytes:
                self.reset()

    # What goes out.

    def json(self, document: Any, status: int = 200, **headers: str) -> None:
        """Answer with a document."""
        data = json.dumps(document).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answer(status, data, 0, len(data), {"Content-Type": "application/json", **headers})

    def file(self, blob: Blob, headers: dict[str, str]) -> None:
        """Answer with a file, or the range of it that is asked for."""
        start, stop, status = 0, blob.nbytes, 200
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{blob.etag}"', **headers}
        asked = self.headers.get("Range")
        if asked is not None:
            low, _, high = asked.removeprefix("bytes=").partition("-")
            start = int(low) if low else max(0, blob.nbytes - int(high))
            stop = min(blob.nbytes, int(high) + 1) if low and high else blob.nbytes
            if start >= stop:
                size = {"Content_Range": f"bytes */{blob.nbytes}"}
                raise Refusal(416, "Requested Range Not Satisfiable", **size)
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.nbytes}"
        headers["Content-Type"] = "application/octet-stream"
        self.answer(status, blob.content, start, stop, headers)

    def answer(
        self, status: int, content: Content, start: int, stop: int, headers: dict[str, str]
    ) -> None:
        """Send headers and those bytes of the content, with the fault that was asked for."""
        fault = self.fault(stop - start) if status < 400 else None
        promised = stop - start
        if isinstance(fault, WrongLength):
            promised += fault.by
            stop = min(stop, start + promised)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(promised))
        self.end_headers()
        self.request_log.status = status
        if self.command == "HEAD":
            return
        with _opened(content) as source:
            for step, (low, high) in enumerate(_steps(fault, start, stop)):
                if step and isinstance(fault, Stall | Slow):
                    seconds = fault.seconds if isinstance(fault, Stall) else 1 / STEPS
                    if self.hub.closing.wait(seconds):
                        raise ConnectionError
                inverted = isinstance(fault, Corrupt) and low == start + fault.offset
                self._send(source, low, high, inverted)
        if isinstance(fault, Cut):
            self.reset()
        if promised > stop - start:
            self.close_connection = True

    def _send(self, source: bytes | int, low: int, high: int, inverted: bool) -> None:
        """Send bytes of memory, or of an open file."""
        while low < high:
            count = min(high - low, CHUNK)
            if inverted:
                data = source[low:high] if isinstance(source, bytes) else os.pread(source, 1, low)
                count = self.connection.send(bytes([data[0] ^ 0xFF]))
            elif isinstance(source, bytes):
                count = self.connection.send(memoryview(source)[low : low + count])
            else:
                count = os.sendfile(self.connection.fileno(), source, low, count)
            low += count
            self.request_log.sent += count

    def reset(self) -> None:
        """Reset the connection, once what was sent has left: no orderly end."""
        for _ in range(1000):
            if not struct.unpack("i", fcntl.ioctl(self.connection, termios.TIOCOUTQ, b"\0" * 4))[0]:
                break
            time.sleep(0.001)
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        for end in (self.rfile, self.wfile, self.connection):  # the last one closes it
            end.close()
        raise ConnectionError


@contextlib.contextmanager
def _opened(content: Content) -> Iterator[bytes | int]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb", buffering=0) as file:
        yield file.fileno()


def _steps(fault: Fault | None, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The ranges in which a body is sent."""
    match fault:
        case Cut(after):
            yield start, min(stop, start + after)
        case Stall(after, _):
            yield start, min(stop, start + after)
            yield min(stop, start + after), stop
        case Corrupt(offset) if start + offset < stop:
            yield start, start + offset
            yield start + offset, start + offset + 1
            yield start + offset + 1, stop
        case Slow(rate):
            step = max(1, rate // STEPS)
            for low in range(start, stop, step):
                yield low, min(stop, low + step)
        case _:
            yield start, stop
