"""A stand-in for the Hugging Face Hub on the loopback: it answers what huggingface_hub requests, and can fail."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import uuid
from urllib.parse import unquote, urlsplit


def git_id(content):
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def is_large(name):
    return name.endswith(('.safetensors', '.bin'))


def content_id(name, content):
    return hashlib.sha256(content).hexdigest() if is_large(name) else git_id(content)


class Repository:
    """Files by branch. Each state has the name of a commit."""

    def __init__(self, private=False):
        self.private = private
        self.gated = False
        self.branches = {'main': {'.gitattributes': b'*.safetensors filter=lfs\n'}}
        self.commits = 0

    def commit(self, branch, added):
        self.branches[branch] = {**self.branches.get(branch, self.branches['main']), **added}
        self.commits += 1

    def sha(self, branch='main'):
        content = json.dumps({k: git_id(v) for k, v in sorted(self.branches[branch].items())})
        return hashlib.sha1(content.encode()).hexdigest()

    def find(self, revision):
        """The files of a branch or of a commit, and the commit's name."""
        for branch in self.branches:
            if revision in (branch, self.sha(branch)):
                return self.branches[branch], self.sha(branch)
        return None, None


class StandinHub:
    """The server: its repositories, the requests so far, and the faults to come.

    A fault is a function of the request handler that answers in its place and returns True, or returns False.
    """

    def __init__(self):
        self.repositories = {}
        self.release = {}
        self.uploads = {}
        self.pull_requests = {}
        self.asked = []
        self.faults = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self):
        for state in (self.repositories, self.release, self.uploads, self.pull_requests, self.asked, self.faults):
            state.clear()

    def add(self, repo_id, files):
        repository = self.repositories.setdefault(repo_id, Repository())
        repository.commit('main', files)
        return repository

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

    def paths(self, method):
        return [path for m, path in self.asked if m == method]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub = None

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError, ValueError):  # the client has gone, perhaps in the middle of a chunk
            super().handle()

    def reply(self, status, body=b'', **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault('Content_Type', 'application/json')
        self.send_response(status)
        headers.setdefault('Content_Length', str(len(body)))
        for key, value in headers.items():
            self.send_header(key.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def error(self, status, code='', message=''):
        self.reply(status, {'error': message or code}, X_Error_Code=code, X_Error_Message=message or code)

    def body(self):
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        content = b''
        while size := int(self.rfile.readline().partition(b';')[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self):
        self.hub.asked.append((self.command, self.path))
        self.sent = self.body() if self.command in ('POST', 'PUT', 'DELETE') else b''
        if any(fault(self) for fault in list(self.hub.faults)):
            return
        path = unquote(urlsplit(self.path).path)
        for method, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                getattr(self, name)(**found.groupdict())
                return
        self.error(404, 'NoRoute', f'{self.command} {path} is nothing that this server knows')

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def repository(self, repo_id):
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            self.error(404, 'RepoNotFound', 'Repository not found')
        return repository

    def resolve(self, repo_id, revision, name):
        repository = self.repository(repo_id)
        if repository is None:
            return
        if repository.gated:
            self.error(403, 'GatedRepo', 'Access to this model is restricted')
            return
        files, sha = repository.find(revision)
        if files is None:
            self.error(404, 'RevisionNotFound', 'Invalid rev id')
            return
        if name not in files:
            self.reply(404, b'Entry not found', X_Error_Code='EntryNotFound', X_Repo_Commit=sha)
            return
        content = files[name]
        self.reply(200, content, ETag=f'"{content_id(name, content)}"', X_Repo_Commit=sha, Accept_Ranges='none')

    def info(self, repo_id, revision='main'):
        repository = self.repository(repo_id)
        if repository is None:
            return
        files, sha = repository.find(revision)
        if files is None:
            self.error(404, 'RevisionNotFound', 'Invalid rev id')
            return
        siblings = []
        for name, content in files.items():
            entry = {'rfilename': name, 'size': len(content), 'blobId': git_id(content)}
            if is_large(name):
                entry['lfs'] = {'sha256': hashlib.sha256(content).hexdigest(), 'size': len(content), 'pointerSize': 134}
            siblings.append(entry)
        self.reply(
            200, {'id': repo_id, 'modelId': repo_id, 'sha': sha, 'private': repository.private, 'siblings': siblings}
        )

    def tree(self, repo_id, revision):
        repository = self.repository(repo_id)
        files, _ = repository.find(revision)
        self.reply(200, [{'type': 'file', 'path': k, 'size': len(v), 'oid': git_id(v)} for k, v in files.items()])

    def download(self, name):
        if name in self.hub.release:
            self.reply(200, self.hub.release[name])
        else:
            self.reply(404, b'Not Found')

    def whoami(self):
        self.reply(200, {'type': 'user', 'name': 'org', 'orgs': []})

    def create(self):
        asked = json.loads(self.sent)
        repo_id = f'{asked.get("organization") or "org"}/{asked["name"]}'
        if repo_id in self.hub.repositories:
            self.error(409, 'RepoExists', 'You already created this model repo')
            return
        private = asked.get('private') or asked.get('visibility') == 'private'
        self.hub.repositories[repo_id] = Repository(private=bool(private))
        self.reply(200, {'url': f'{self.hub.url}/{repo_id}', 'name': repo_id, 'id': repo_id})

    def delete(self):
        asked = json.loads(self.sent)
        del self.hub.repositories[f'{asked.get("organization") or "org"}/{asked["name"]}']
        self.reply(200, b'OK')

    def validate(self):
        front = json.loads(self.sent)['content'].split('---')[1]
        if 'license: nonsense' in front:
            self.reply(400, b'"license" must be one of the known licences')
            return
        self.reply(200, {'warnings': [], 'errors': []})

    def branch(self, repo_id, revision):
        repository = self.repository(repo_id)
        if revision in repository.branches:
            self.error(409, 'RefExists', 'Reference already exists')
            return
        repository.branches[revision] = dict(repository.branches['main'])
        self.reply(200, {})

    def preupload(self, repo_id, revision):
        held = self.hub.repositories[repo_id].branches.get(revision, {})
        answers = []
        for asked in json.loads(self.sent)['files']:
            name = asked['path']
            answers.append({'path': name, 'uploadMode': 'lfs' if is_large(name) else 'regular', 'shouldIgnore': False})
            if name in held:
                answers[-1]['oid'] = content_id(name, held[name])
        self.reply(200, {'files': answers})

    def batch(self, repo_id):
        objects = []
        for item in json.loads(self.sent)['objects']:
            href = f'{self.hub.url}/upload/{item["oid"]}'
            objects.append({**item, 'actions': {'upload': {'href': href, 'header': {}}}})
        self.reply(200, {'transfer': 'basic', 'objects': objects})

    def upload(self, oid):
        if hashlib.sha256(self.sent).hexdigest() != oid:
            self.error(400, 'BadHash', 'another content')
            return
        self.hub.uploads[oid] = self.sent
        self.reply(200)

    def commit(self, repo_id, revision):
        repository = self.repository(repo_id)
        added = {}
        for line in self.sent.splitlines():
            item = json.loads(line)
            if item['key'] == 'header':
                parent = item['value'].get('parentCommit')
                if parent not in (None, repository.sha(revision)):
                    self.error(412, '', 'A commit has happened since. Please refresh and try again.')
                    return
            elif item['key'] == 'file':
                added[item['value']['path']] = base64.b64decode(item['value']['content'])
            elif item['key'] == 'lfsFile':
                added[item['value']['path']] = self.hub.uploads[item['value']['oid']]
        answer = {'success': True}
        if 'create_pr=1' in self.path:
            number = len(self.hub.pull_requests) + 1
            self.hub.pull_requests[number] = added
            answer['pullRequestUrl'] = f'{self.hub.url}/{repo_id}/discussions/{number}'
            oid = uuid.uuid4().hex
        else:
            repository.commit(revision, added)
            oid = repository.sha(revision)
        self.reply(200, {**answer, 'commitOid': oid, 'commitUrl': f'{self.hub.url}/{repo_id}/commit/{oid}'})


_REPO = r'(?P<repo_id>[^/]+/[^/]+)'
_ROUTES = (
    ('GET', r'/matej-ulicny/harmonic-networks/releases/download/0\.1\.0/(?P<name>.+)', 'download'),
    ('GET HEAD', rf'/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)', 'resolve'),
    ('GET', rf'/api/models/{_REPO}', 'info'),
    ('GET', rf'/api/models/{_REPO}/revision/(?P<revision>.+)', 'info'),
    ('GET', rf'/api/models/{_REPO}/tree/(?P<revision>[^/]+)', 'tree'),
    ('GET', r'/api/whoami-v2', 'whoami'),
    ('POST', r'/api/repos/create', 'create'),
    ('DELETE', r'/api/repos/delete', 'delete'),
    ('POST', r'/api/validate-yaml', 'validate'),
    ('POST', rf'/api/models/{_REPO}/branch/(?P<revision>.+)', 'branch'),
    ('POST', rf'/api/models/{_REPO}/preupload/(?P<revision>.+)', 'preupload'),
    ('POST', rf'/{_REPO}\.git/info/lfs/objects/batch', 'batch'),
    ('PUT', r'/upload/(?P<oid>.+)', 'upload'),
    ('POST', rf'/api/models/{_REPO}/commit/(?P<revision>.+)', 'commit'),
)
