"""A local server with the part of the Hugging Face Hub that huggingface_hub uses to download a file."""

import contextlib
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def _answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        parts = self.path.strip("/").split("/", 4)
        if len(parts) < 5:  # only files are served
            return self._answer(404)
        owner, name, _, revision, file = parts
        self.server.requests.append(
            (self.command, f"{owner}/{name}", revision, file, self.headers.get("Authorization"))
        )
        repo = self.server.repos.get(f"{owner}/{name}")
        secret = repo is not None and repo.get("token")
        if repo is None or (secret and self.headers.get("Authorization") != f"Bearer {secret}"):
            return self._answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if repo.get("gated"):
            return self._answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if revision not in ("main", COMMIT):
            return self._answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        if file not in repo["files"]:
            return self._answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        if repo.get("refused") and self.command == "GET":
            return self._answer(418)
        body = repo["files"][file]
        return self._answer(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET  # noqa: N815


@contextlib.contextmanager
def serve(repos):
    """Serve repositories, and yield the server with its `address`.

    Args:
        repos: by id, `{"files": {name: bytes}}`, and optionally the required `token`, `gated`, or `refused` downloads.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.repos, server.requests = repos, []
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
