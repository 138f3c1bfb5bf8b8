"""What the test Hub (server.py) knows to answer: the Hub's API for models."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs, quote

import yaml

from tests.hub.answers import Handler, Refusal
from tests.hub.repos import GITATTRIBUTES, Blob, Commit, Repo, is_lfs

DATE = "2026-01-01T00:00:00.000Z"


def route(handler: Handler) -> None:
    """Answer one request, or raise a Refusal."""
    parts, method = handler.parts, handler.command
    if handler.server.cdn:
        return _upload(handler) if method == "PUT" else _cdn(handler)
    match parts:
        case ["api", "whoami-v2"]:
            return _whoami(handler)
        case ["api", "validate-yaml"]:
            return _validate_card(handler)
        case ["api", "repos", "create"]:
            return _create(handler)
        case ["api", "models", org, name, *rest]:
            return _api(handler, f"{org}/{name}", rest)
        case [org, name, "resolve", revision, *path]:
            return _resolve(handler, f"{org}/{name}", revision, "/".join(path))
        case [org, name, "info", "lfs", "objects", what] if name.endswith(".git"):
            return _lfs(handler, f"{org}/{name.removesuffix('.git')}", what)
    raise Refusal(404, f"no such page: {handler.path}")


def _token(handler: Handler) -> str | None:
    """The token that came along, if the server knows it."""
    given = handler.headers.get("Authorization")
    if given is None:
        return None
    token = given.removeprefix("Bearer ")
    known = {*handler.hub.user_tokens, *(r.token for r in handler.hub.repos.values() if r.token)}
    if token not in known:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return token


def _repo(handler: Handler, name: str, write: bool = False) -> Repo:
    """The repository, if whoever asks may read it, or write to it."""
    token = _token(handler)
    role = handler.hub.user_tokens.get(token or "")
    repo = handler.hub.repos.get(name)
    hidden = repo is not None and repo.private and role is None and token != repo.token
    if repo is None or hidden:
        if token is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")
    if write and token is None:
        raise Refusal(401, "Invalid username or password.")
    if write and (role != "write" or name.split("/")[0] not in handler.hub.namespaces):
        raise Refusal(403, f"Forbidden: you must use a write token to upload to {name}")
    return repo


def _at(handler: Handler, repo: Repo, revision: str) -> Commit:
    commit = repo.at(revision)
    if commit is None:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def _resolve(handler: Handler, name: str, revision: str, path: str) -> None:
    """A file, or where it is: answers HEAD and GET."""
    repo = _repo(handler, name)
    commit = _at(handler, repo, revision)
    told = {"X-Repo-Commit": commit.sha}
    if repo.gated:
        token = _token(handler)
        if token is None or token != repo.token:
            status = 401 if token is None else 403
            message = f"Access to model {name} is restricted."
            raise Refusal(status, message, "GatedRepo", **told)
    handler.request_log.file = f"{name}/{path}"
    blob = commit.files.get(path)
    if blob is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", **told)
    if blob.lfs is None:
        return handler.file(blob, told)
    told |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.nbytes)}
    told |= {"Location": handler.hub.signed(blob, name, path), "ETag": f'"{blob.oid}"'}
    handler.answer(302, b"", 0, 0, told)


def _cdn(handler: Handler) -> None:
    """A large file, for whoever has a link that still holds, and no token."""
    sha256, *name = handler.parts
    handler.request_log.file = "/".join(name)
    if "Authorization" in handler.headers:
        raise Refusal(400, "Only one auth mechanism allowed")
    if float(handler.query.get("Expires", 0)) < time.time():
        raise Refusal(403, "Request has expired")
    handler.file(handler.hub.large[sha256], {})


def _whoami(handler: Handler) -> None:
    role = handler.hub.user_tokens.get(_token(handler) or "")
    if role is None:
        raise Refusal(401, "Invalid username or password.")
    orgs = [{"name": name, "type": "org"} for name in handler.hub.namespaces[1:]]
    access = {"accessToken": {"displayName": "test", "role": role}}
    facts = {"type": "user", "name": handler.hub.user, "orgs": orgs, "auth": access}
    handler.json(facts)


def _validate_card(handler: Handler) -> None:
    """Whether a README.md begins with metadata that can be read."""
    front = json.loads(handler.body())["content"].split("---")
    errors = []
    try:
        yaml.safe_load(front[1] if len(front) > 2 else "")
    except yaml.YAMLError as error:
        errors.append({"message": str(error)})
    handler.json({"errors": errors, "warnings": []}, 400 if errors else 200)


def _create(handler: Handler) -> None:
    role = handler.hub.user_tokens.get(_token(handler) or "")
    if role is None:
        raise Refusal(401, "Invalid username or password.")
    asked = json.loads(handler.body())
    org = asked.get("organization") or handler.hub.user
    if role != "write" or org not in handler.hub.namespaces:
        message = f"You don't have the rights to create a model under the namespace {org!r}"
        raise Refusal(403, message)
    name = f"{org}/{asked['name']}"
    url = {"url": f"{handler.hub.endpoint}/{name}", "name": name}
    with handler.hub.lock:
        if name in handler.hub.repos:
            return handler.json({"error": "You already created this model repo", **url}, 409)
        made = Repo(name, private=asked.get("visibility") == "private")
        attributes = ".gitattributes"
        made.commit({attributes: Blob.of(attributes, GITATTRIBUTES.encode())}, "initial commit")
        handler.hub.repos[name] = made
    handler.json(url)


def _api(handler: Handler, name: str, rest: list[str]) -> None:
    """/api/models/ORG/NAME/..."""
    writes = {"preupload", "commit", "branch"}
    write = bool(rest) and (rest[0] in writes or rest == ["auth-check", "write"])
    repo = _repo(handler, name, write)
    match rest:
        case [] | ["revision", _]:
            _info(handler, repo, _at(handler, repo, rest[1] if rest else "main"))
        case ["tree", revision, *path]:
            _tree(handler, _at(handler, repo, revision), "/".join(path))
        case ["paths-info", revision]:
            asked = set(parse_qs(handler.body().decode())["paths"])
            entries = _entries(_at(handler, repo, revision), recursive=True)
            handler.json([entry for entry in entries if entry["path"] in asked])
        case ["refs"]:
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit.sha}
                for branch, commit in repo.branches.items()
            ]
            handler.json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})
        case ["commits", revision]:
            history = _at(handler, repo, revision).history()
            facts = {"authors": [], "date": DATE, "message": ""}
            handler.json([{"id": c.sha, "title": c.title, **facts} for c in history])
        case ["auth-check", *_]:
            handler.json({})
        case ["preupload", revision]:
            _preupload(handler, repo, revision)
        case ["commit", branch]:
            _commit(handler, repo, branch)
        case ["branch", branch]:
            asked_from = json.loads(handler.body() or b"{}").get("startingPoint", "main")
            with handler.hub.lock:
                if branch in repo.branches:
                    raise Refusal(409, "Reference already exists")
                repo.branches[branch] = _at(handler, repo, asked_from)
            handler.json({})
        case _:
            raise Refusal(404, f"no such page: {handler.path}")


def _info(handler: Handler, repo: Repo, commit: Commit) -> None:
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
    if handler.query.get("blobs", "").lower() in ("1", "true"):
        for sibling in siblings:
            blob = commit.files[sibling["rfilename"]]
            sibling |= {"blobId": blob.oid, "size": blob.nbytes}
            if blob.lfs:
                sibling["lfs"] = {**blob.lfs, "sha256": blob.sha256}
    handler.json(
        {
            "id": repo.name,
            "modelId": repo.name,
            "author": repo.name.split("/")[0],
            "sha": commit.sha,
            "lastModified": DATE,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "tags": [],
            "siblings": siblings,
        }
    )


def _entries(commit: Commit, recursive: bool, under: str = "") -> Iterable[dict[str, Any]]:
    """Files and folders below a folder, as the API lists them."""
    prefix = f"{under}/" if under else ""
    folders: set[str] = set()
    for path, blob in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        inner = path.removeprefix(prefix).split("/")[:-1]
        for depth in range(1, (len(inner) if recursive else min(1, len(inner))) + 1):
            folder = prefix + "/".join(inner[:depth])
            if folder not in folders:
                folders.add(folder)
                oid = hashlib.sha1(folder.encode(), usedforsecurity=False).hexdigest()
                yield {"type": "directory", "path": folder, "oid": oid, "size": 0}
        if recursive or not inner:
            entry = {"type": "file", "path": path, "oid": blob.oid, "size": blob.nbytes}
            yield entry | ({"lfs": blob.lfs} if blob.lfs else {})


def _tree(handler: Handler, commit: Commit, under: str) -> None:
    def asked(what: str) -> bool:
        return handler.query.get(what, "").lower() in ("1", "true")

    entries = list(_entries(commit, asked("recursive"), under))
    if under and not entries:
        told = {"X-Repo-Commit": commit.sha}
        raise Refusal(404, f"{under} does not exist on the revision", "EntryNotFound", **told)
    if asked("expand"):
        last = {"id": commit.sha, "title": commit.title, "date": DATE}
        entries = [entry | {"lastCommit": last} for entry in entries]
    start = int(handler.query.get("cursor", 0))
    page = min(handler.hub.page, int(handler.query.get("limit", handler.hub.page)))
    headers = {}
    if start + page < len(entries):
        query = "&".join(f"{k}={v}" for k, v in handler.query.items() if k != "cursor")
        path = "/".join(quote(part, safe="") for part in handler.parts)
        url = f"{handler.hub.endpoint}/{path}?{query}&cursor={start + page}"
        headers["Link"] = f'<{url}>; rel="next"'
    handler.json(entries[start : start + page], **headers)


def _preupload(handler: Handler, repo: Repo, revision: str) -> None:
    """How each file is to be sent, and what is there already."""
    commit = _at(handler, repo, revision)
    answers = []
    for file in json.loads(handler.body())["files"]:
        path, there = file["path"], commit.files.get(file["path"])
        mode = "lfs" if is_lfs(path, file["size"]) else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        answers.append(answer | ({"oid": there.etag} if there else {}))
    handler.json({"files": answers})


def _lfs(handler: Handler, name: str, what: str) -> None:
    """Where large files are to be sent; whether they arrived."""
    repo = _repo(handler, name, write=True)
    asked = json.loads(handler.body())
    if what == "verify":
        if asked["oid"] not in handler.hub.large:
            raise Refusal(404, f"{asked['oid']} was not uploaded")
        return handler.json({})
    answers = []
    for file in asked["objects"]:
        answer: dict[str, Any] = {"oid": file["oid"], "size": file["size"]}
        if file["oid"] not in handler.hub.large:
            upload = f"{handler.hub.cdn_endpoint}/{file['oid']}/{repo.name}?Signature=upload"
            verify = f"{handler.hub.endpoint}/{repo.name}.git/info/lfs/objects/verify"
            answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        answers.append(answer)
    handler.json({"transfer": "basic", "objects": answers})


def _upload(handler: Handler) -> None:
    """Take a large file, if it is what it was announced as."""
    sha256, *name = handler.parts
    handler.request_log.file = "/".join(name)
    path = handler.hub.uploads / f"{sha256}.{handler.request_log.number}"
    found, nbytes = hashlib.sha256(), 0
    with path.open("wb") as file:

        def write(data: bytes) -> None:
            nonlocal nbytes
            file.write(data)
            found.update(data)
            nbytes += len(data)

        handler.upload(write)
    if found.hexdigest() != sha256:
        raise Refusal(400, f"content is {found.hexdigest()}, announced as {sha256}")
    with handler.hub.lock:
        handler.hub.large[sha256] = Blob.large(path, nbytes, sha256)
    handler.answer(200, b"", 0, 0, {"ETag": f'"{sha256}"'})


def _commit(handler: Handler, repo: Repo, branch: str) -> None:
    """Move a branch: header, then one line a file."""
    header, *lines = [json.loads(line) for line in handler.body().splitlines()]
    asked = header["value"]
    with handler.hub.lock:
        parent = repo.branches.get(branch)
        if parent is None:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if asked.get("parentCommit", parent.sha) != parent.sha:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines:
            _apply(handler, files, line["key"], line["value"])
        made = repo.commit(files, asked["summary"], branch)
    url = f"{handler.hub.endpoint}/{repo.name}/commit/{made.sha}"
    handler.json({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""})


def _apply(handler: Handler, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        files[path] = Blob.of(path, base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in handler.hub.large:
            raise Refusal(400, f"{path}: LFS pointer points to a file that does not exist")
        files[path] = handler.hub.large[value["oid"]]
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        for inside in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
            del files[inside]
    else:
        raise Refusal(400, f"unknown operation {key!r}")
