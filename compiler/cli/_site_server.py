"""A web server for a packaged site, on this machine alone. Not a verb.

Every file may be read from pages of other origins, so that a page under development finds the
model here. Browsers ask each time whether a file changed, and do not store weights: the page keeps
them in a cache of its own.
"""

from __future__ import annotations

import errno
import functools
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from qcc.runtime.errors import QccError

HOST = "127.0.0.1"
TRIED = 20  # ports from the default on


class _Handler(SimpleHTTPRequestHandler):
    """Files with the headers that WebGPU pages want."""

    protocol_version = "HTTP/1.1"
    extensions_map = {  # noqa: RUF012 (as the base class declares it)
        **SimpleHTTPRequestHandler.extensions_map,
        ".wasm": "application/wasm",
        ".js": "text/javascript",
        ".json": "application/json",
        ".md": "text/plain; charset=utf-8",
        ".ts": "text/plain; charset=utf-8",
    }

    def end_headers(self) -> None:
        """Add ours to those of every answer."""
        self.send_header("Access-Control-Allow-Origin", "*")
        kept = "no-store" if self.path.partition("?")[0].endswith(".bin") else "no-cache"
        self.send_header("Cache-Control", kept)
        super().end_headers()

    def list_directory(self, path: Any) -> None:
        """Show no listings: folders without an index.html are nobody's business."""
        self.send_error(404, "File not found")

    def log_request(self, *_: Any) -> None:
        """Be quiet about what went well."""

    def log_message(self, form: str, *args: Any) -> None:
        """What did not goes to standard error."""
        print(f"{self.command} {self.path}: {form % args}", file=sys.stderr)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves midway is no error of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class SiteServer:
    """An open port that serves a folder once `serve` is called."""

    def __init__(self, server: _Server) -> None:
        """Use `open_server`."""
        self._server = server
        self.url = f"http://localhost:{server.server_address[1]}/"

    def serve(self) -> None:
        """Serve until interrupted or closed."""
        try:
            self._server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass
        finally:
            self._server.server_close()

    def close(self) -> None:
        """Let `serve` return."""
        self._server.shutdown()


def open_server(folder: Path, port: int, default: int) -> SiteServer:
    """Take a port; where the default one is taken, one of the next.

    Raises:
        QccError: the port is taken, or is none.
    """
    handler = functools.partial(_Handler, directory=str(folder))
    tried = range(port, port + TRIED) if port == default else range(port, port + 1)
    for number in tried:
        try:
            return SiteServer(_Server((HOST, number), handler))
        except OverflowError as err:
            raise QccError(f"--serve {port}: a port is 0 to 65535 (0: any free one)") from err
        except OSError as err:
            reason = err.strerror
            if err.errno != errno.EADDRINUSE:
                break
    raise QccError(f"--serve {port}: {reason}; choose another port, as --serve {default + 80}")
