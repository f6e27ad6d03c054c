"""A server on this machine that W&B's own client takes for W&B's, and that remembers what it was sent.

It speaks as much of the protocol as a run needs: GraphQL for runs and artifacts, and the stream of a run's history, by
lines and the number of the first one, which the client has from the server where it resumes a run.
"""

import contextlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"
PROJECT: dict[str, Any] = {"id": "1", "internalId": "1", "name": "flexpert", "entity": {"id": "1", "name": "me"}}


@dataclass
class Run:
    """What the server knows of a run.

    Attributes:
        facts: of its newest UpsertBucket: `groupName`, `jobType`, `displayName`, …
        config, summary: {key: value}.
        rows: of the history, as the client numbers them.
        steps: `_step` of each row in the order in which they came; a row that came again is here again.
        exit_codes: with which it was finished.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)

    def write(self, file: str, offset: int, lines: list[str]) -> None:
        if file == HISTORY:
            self.rows[offset : offset + len(lines)] = lines
            self.steps += [json.loads(line)["_step"] for line in lines]
        elif file == SUMMARY:
            self.summary = json.loads(lines[-1])

    def status(self) -> dict[str, Any]:
        """As a client asks for it that is to resume the run."""
        counts = {"historyLineCount": len(self.rows), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"historyTail": json.dumps(self.rows[-1:]), "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
        config = json.dumps({key: {"value": value} for key, value in self.config.items()})
        kept = {
            "summaryMetrics": json.dumps(self.summary),
            "config": config,
            "tags": [],
            "displayName": "",
            "notes": "",
        }
        return {"id": "1", "name": "1", **counts, **texts, **kept}


@dataclass
class Store:
    """All that the server was sent.

    Attributes:
        address: where it listens.
        runs: by id.
        artifacts: (run, "made" or "used", name), in order; an artifact that is used is made by the client, too.
        files: by name, those that were uploaded.
        bodies: of all requests.
        accepts: whether the client's key is one that it knows.
    """

    address: str
    runs: dict[str, Run] = field(default_factory=dict)
    artifacts: list[tuple[str, str, str]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)
    accepts: bool = True
    known: dict[str, dict[str, Any]] = field(default_factory=dict)  # artifacts by their ids

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query)
        answer = getattr(self, f"on_{operation[1]}", None) if operation is not None else None
        return {} if answer is None else answer(given)

    def on_Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def on_RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        return {"model": {**PROJECT, "bucket": None if run is None else run.status()}}

    def on_UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        is_new = given["name"] not in self.runs
        run = self.runs.setdefault(given["name"], Run())
        run.facts |= {key: value for key, value in given.items() if value is not None}
        if given.get("config"):
            run.config = {key: part["value"] for key, part in json.loads(given["config"]).items()}
        name = given["name"]
        bucket = {"id": name, "name": name, "displayName": name, "config": "{}", "project": PROJECT}
        return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": len(run.rows)}, "inserted": is_new}}

    def on_CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.address}/upload/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def on_ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}  # that has an artifact of this name

    def on_CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        made = given["input"]
        key = f"{made['artifactCollectionName']}:{made['digest']}"
        self.known[key] = made
        self.artifacts.append((made["runName"], "made", made["artifactCollectionName"]))
        sequence = {"id": "1", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": key, "state": "COMMITTED", "artifactSequence": sequence}}}

    def on_UseArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        used = given["input"]
        name = self.known[used["artifactID"]]["artifactCollectionName"]
        self.artifacts.append((used["runName"], "used", name))
        return {"useArtifact": {"artifact": {"id": used["artifactID"]}}}

    def on_ArtifactByID(self, given: dict[str, Any]) -> dict[str, Any]:
        made = self.known[given["id"]]
        sequence = {"__typename": "ArtifactSequence", "name": made["artifactCollectionName"], "project": PROJECT}
        kind, metadata = {"name": made["artifactTypeName"]}, made.get("metadata") or "{}"
        numbers = {"versionIndex": 0, "ttlDurationSeconds": -2, "historyStep": None, "size": 0, "fileCount": 0}
        absent = {"description": None, "commitHash": None, "updatedAt": None}
        facts = {"tags": [], "aliases": [], "state": "COMMITTED", "digest": made["digest"], "ttlIsInherited": True}
        whole = {"__typename": "Artifact", "id": given["id"], "artifactSequence": sequence, "artifactType": kind}
        return {"artifact": {**whole, **numbers, **absent, **facts, "metadata": metadata, "createdAt": "2026-01-01"}}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # from a client that was killed
            super().handle()

    def do_POST(self) -> None:
        body = json.loads(self.body())
        if self.path == "/graphql":
            self.reply({"data": self.store.answer(body["query"], body.get("variables") or {})})
            return
        run = self.store.runs[self.path.split("/")[-2]]
        for file, part in body.get("files", {}).items():
            run.write(file, part["offset"], part["content"])
        if body.get("complete"):
            run.exit_codes.append(body["exitcode"])
        self.reply({})

    def do_PUT(self) -> None:
        self.store.files[self.path.removeprefix("/upload/")] = self.body()
        self.reply({})

    def body(self) -> bytes:
        self.store.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        return self.store.bodies[-1]

    def reply(self, content: dict[str, Any]) -> None:
        answer = json.dumps(content).encode()
        self.send_response(200 if self.store.accepts else 401)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def served(accepts: bool = True) -> Iterator[Store]:
    """The server while the block runs."""
    kind = type("Handler", (Handler,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        kind.store = store = Store(f"http://127.0.0.1:{server.server_port}", accepts=accepts)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield store
        server.shutdown()
