"""An edge daemon in Python: enrolls once, reports how its host is for as long as it runs, and holds one connection until it
is taken back. See docs/integrate.md."""

import argparse
import os
import queue
import random
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

import grpc
from google.rpc import error_details_pb2, status_pb2

import identity
from edgemesh.v1 import authorize_pb2, authorize_pb2_grpc, heartbeat_pb2, heartbeat_pb2_grpc, types_pb2

# What no repetition helps: the identity was ended.
FINAL = {"DEVICE_REVOKED", "DEVICE_DELETED", "CERTIFICATE_REVOKED", "CERTIFICATE_RETIRED", "CERTIFICATE_EXPIRED"}


class Ended(Exception):
    """Only a person can help."""


class Daemon:
    def __init__(self, server: str, folder: Path, shown: identity.Identity):
        self.server = server
        self.folder = folder
        self.shown = shown
        # Before the first report is durable every question is denied.
        self.reported = threading.Event()
        self.lost: Exception | None = None

    def keep_reporting(self) -> None:
        """Opens one heartbeat stream after the other, until the server has ended the identity."""
        failures = 0
        try:
            while True:
                try:
                    self.report()
                    failures = 0
                except grpc.RpcError as error:
                    pause("heartbeat", error, failures, 60)
                    failures += 1
        except Exception as error:  # whoever waits for the first report has to hear of it
            self.lost = error
            self.reported.set()

    def report(self) -> None:
        """Reports on one stream. Returns when the server wants another one opened."""
        outgoing: queue.SimpleQueue = queue.SimpleQueue()
        renew_at = None
        # A stream's first report is whole; later ones may leave out what has not changed.
        outgoing.put(self.next_report(1))
        try:
            with self.shown.channel(self.server) as channel:
                for answer in heartbeat_pb2_grpc.HeartbeatServiceStub(channel).Heartbeat(iter(outgoing.get, None)):
                    if not self.reported.is_set():
                        print(f"reported, failing: {' '.join(answer.failing_posture)}", flush=True)
                        self.reported.set()
                    wait = answer.next_interval.ToTimedelta().total_seconds()
                    for directive in answer.directives:
                        kind = directive.WhichOneof("kind")
                        if kind == "revoked":
                            raise Ended(f"the device was revoked: {directive.revoked.reason}")
                        if kind == "reconnect":
                            time.sleep(directive.reconnect.delay.ToTimedelta().total_seconds())
                            return
                        # After a delay, where a whole fleet is asked; the first to ask counts.
                        if kind == "renew_certificate" and renew_at is None:
                            delay = directive.renew_certificate.delay.ToTimedelta().total_seconds()
                            renew_at = time.monotonic() + delay
                        if kind == "trust_bundle":
                            self.shown = identity.adopt(self.folder, self.shown, directive.trust_bundle.trust_bundle)
                            wait = 0  # a change of the authority waits for devices to say that they have it
                    if renew_at is not None and time.monotonic() >= renew_at:
                        if self.renew():
                            return
                        renew_at = time.monotonic() + 60
                    time.sleep(wait)
                    outgoing.put(self.next_report(answer.acknowledged_sequence + 1))
        finally:
            outgoing.put(None)  # or whoever sends would wait for it for ever

    def next_report(self, sequence: int) -> heartbeat_pb2.HeartbeatRequest:
        return heartbeat_pb2.HeartbeatRequest(
            sequence=sequence, posture=posture(), sent_at=now(), trust_bundle_id=self.shown.bundle_id
        )

    def renew(self) -> bool:
        try:
            self.shown = identity.renew(self.server, self.folder, self.shown)
        except grpc.RpcError as error:  # the certificate before is still good
            print(f"not renewed yet: {details(error)[0]}: {error.details()}", flush=True)
            return False
        print("renewed", flush=True)
        return True

    def hold(self, user: str, service: str) -> None:
        """Asks for a connection and holds it until it is taken back: on the next stream, where one is lost."""
        question = authorize_pb2.Question(id="1", user=user, service=service)
        self.first = authorize_pb2.AuthorizeRequest(questions=authorize_pb2.Questions(questions=[question]))
        failures = 0
        while self.lost is None:
            try:
                if self.hold_on_stream():
                    return
                failures = 0
            except grpc.RpcError as error:
                # What is held is held for half a minute without a stream: pauses are short.
                pause("authorize", error, failures, 2)
                failures += 1
        raise self.lost

    def hold_on_stream(self) -> bool:
        """Returns whether the connection has ended; what the next stream is to begin with is in `first` otherwise."""
        outgoing: queue.SimpleQueue = queue.SimpleQueue()
        outgoing.put(self.first)
        try:
            with self.shown.channel(self.server) as channel:
                stream = authorize_pb2_grpc.AuthorizeServiceStub(channel).Authorize(iter(outgoing.get, None))
                for message in stream:
                    for answer in message.answers.answers:
                        if answer.allowed:
                            print(f"allowed {answer.connection_id}", flush=True)  # connect now
                            resume = authorize_pb2.ResumeConnections(connection_ids=[answer.connection_id])
                            self.first = authorize_pb2.AuthorizeRequest(resume=resume)
                        elif answer.HasField("retry_after"):  # it could not be decided
                            time.sleep(answer.retry_after.ToTimedelta().total_seconds())
                            return False
                        else:
                            print(f"denied {codes(answer.reasons)}", flush=True)  # cut the connection, if it was open
                            return True
                    if message.HasField("revoked"):
                        print(f"revoked {codes(message.revoked.reasons)}", flush=True)  # cut it, and then say so
                        ids = [message.revoked.connection_id]
                        acknowledge = authorize_pb2.AcknowledgeRevocations(connection_ids=ids)
                        outgoing.put(authorize_pb2.AuthorizeRequest(acknowledge=acknowledge))
                        outgoing.put(None)
                        for _ in stream:
                            pass
                        return True
                return False
        finally:
            outgoing.put(None)


def posture() -> types_pb2.Posture:
    """Measures this host. What is absent was not measured, and the shipped policy takes that for a no."""
    return types_pb2.Posture(
        cpu_percent=12,
        memory_percent=12,
        disk_percent=12,
        patches_current=True,
        antivirus_enabled=True,
        disk_encrypted=True,
        firewall_enabled=True,
        measured_at=now(),
    )


def now() -> datetime:
    return datetime.now(timezone.utc)


def codes(reasons) -> str:
    return " ".join(reason.code for reason in reasons)


def details(error: grpc.RpcError) -> tuple[str, float]:
    """The reason that the server gives, and for how many seconds it wants to be left alone."""
    reason, wait = error.code().name, 0.0
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    for detail in status_pb2.Status.FromString(packed).details if packed else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            wait = retry.retry_delay.ToTimedelta().total_seconds()
    return reason, wait


def pause(what: str, error: grpc.RpcError, failures: int, most: float) -> None:
    """Waits for as long as the server asks, and on top for any time up to a bound that doubles: a fleet that lost its server
    together does not come back together."""
    reason, wait = details(error)
    if reason in FINAL:
        raise Ended(f"{reason}: {error.details()}") from error
    wait += random.uniform(0, min(most, 2 ** min(failures, 10)))
    print(f"{what}: {reason}: {error.details()}; again in {wait:.1f} s", flush=True)
    time.sleep(wait)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--state", type=Path, default=Path("edge-daemon-state"), help="where its key is kept")
    arguments.add_argument("--id", default="", help="the device's name; empty: the server chooses one")
    arguments.add_argument("--ca", type=Path, help="the roots of the server, for the enrollment")
    arguments.add_argument("--user", default="demo", help="who wants to connect")
    arguments.add_argument("--service", default="demo-database", help="to what")
    options = arguments.parse_args()
    server = os.environ["EDGEMESH_SERVER"]
    shown = identity.load(options.state)
    if shown is None:
        # The token comes from the environment: everyone on the machine can read a command line.
        shown = identity.enroll(server, os.environ["EDGEMESH_TOKEN"], options.ca, options.state, options.id)
    daemon = Daemon(server, options.state, shown)
    threading.Thread(target=daemon.keep_reporting, daemon=True).start()
    daemon.reported.wait()
    daemon.hold(options.user, options.service)


if __name__ == "__main__":
    try:
        main()
    except grpc.RpcError as failure:
        sys.exit(f"error: {details(failure)[0]}: {failure.details()}")
    except (Ended, ValueError, OSError) as failure:
        sys.exit(f"error: {failure}")
    except KeyboardInterrupt:
        pass
