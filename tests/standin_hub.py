"""A stand-in for the Hugging Face Hub and the authors' release page on the loopback: downloads, and their faults."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote, urlsplit


class StandinHub:
    """The server: files by repository, released files, the requests so far, and the faults to come.

    A fault is a function of the request handler that answers in its place and returns True, or returns False.
    """

    def __init__(self):
        self.repositories, self.release, self.asked, self.faults = {}, {}, [], []
        handler = type('Handler', (_Handler,), dict(hub=self))
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self):
        for state in (self.repositories, self.release, self.asked, self.faults):
            state.clear()

    def add(self, repo_id, files):
        self.repositories.setdefault(repo_id, {}).update(files)

    def fail(self, method, path, answer, times=None):
        """From now on `answer(handler)` answers requests that match, so many times or always."""
        left = [times]

        def fault(handler):
            if left[0] == 0 or handler.command not in method.split() or not re.search(path, handler.path):
                return False
            if left[0] is not None:
                left[0] -= 1
            answer(handler)
            return True

        self.faults.append(fault)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub = None

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError, ValueError):  # the client has gone
            super().handle()

    def reply(self, status, body=b'', **headers):
        self.send_response(status)
        for key, value in dict(Content_Length=str(len(body)), **headers).items():
            self.send_header(key.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def error(self, status, code='', message=''):
        self.reply(status, message.encode(), X_Error_Code=code, X_Error_Message=message or code)

    def answer(self):
        self.hub.asked.append((self.command, self.path))
        if any(fault(self) for fault in list(self.hub.faults)):
            return
        path = unquote(urlsplit(self.path).path)
        name = path.rpartition('/')[2]
        if found := re.fullmatch(r'/([^/]+/[^/]+)/resolve/(?:main|[0-9a-f]{40})/(.+)', path):
            self.resolve(*found.groups())
        elif '/releases/download/' in path and name in self.hub.release:
            self.reply(200, self.hub.release[name])
        else:
            self.error(404, 'NoRoute', f'{self.command} {path}')

    do_GET = do_HEAD = answer

    def resolve(self, repo_id, name):
        files = self.hub.repositories.get(repo_id)
        if files is None:
            self.error(404, 'RepoNotFound', 'Repository not found')
            return
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        commit = hashlib.sha1(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        if name in files:
            self.reply(200, files[name], ETag=f'"{digests[name]}"', X_Repo_Commit=commit, Accept_Ranges='none')
        else:
            self.reply(404, b'Entry not found', X_Error_Code='EntryNotFound', X_Repo_Commit=commit)
