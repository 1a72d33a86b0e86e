"""Connections that have not shown yet who they are: one thread for all, and little for each.

A connection is let in when it has done TLS's handshake, where there is TLS, and has proved that it
has the token, where there is one, or else has sent a first whole message. Until then it may send
4 KiB, has 10 seconds, and never gets a thread, a file or the attention of whoever trains. When too
many wait, one of them, drawn at random, makes room: so those who never come to the point cannot
keep out those who do.
"""

import contextlib
import random
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from sfl.certificates import ServerTls, server_tls
from sfl.config import ServerNode
from sfl.driver import Conversation
from sfl.errors import AuthError, ConfigError, ConnectionLost, ProtocolError, SflError, reason_of
from sfl.link import Link, Peer, one_line
from sfl.protocol import HEAD, Decoder, Limits, Message, MessageType, encode_head
from sfl.stream import WRITE, Stream, speaks_tls, to_client, why
from sfl.tokens import SERVER, Tokens, server_authenticate, tokens_of
from sfl.transport import FAREWELL_S, Listener, Socket, address_of, is_loopback

MAX_BYTES = 4096  # that a connection may send before it is let in
LET_IN_WITHIN_S = 10.0
ACCEPTED_PER_S = 1000  # at most; more wait in the system's queue, and leave us time to train
ACCEPTED_AT_ONCE = 16
LOOK_EVERY_S = 0.25  # at the time
MOST_CLIENTS_OF_FED = 500
NOTES_AT_ONCE, NOTES_EVERY_S = 50, 60.0
LIMITS = Limits(json_bytes=MAX_BYTES - HEAD.size)


@dataclass
class Guard:
    """Who is let in."""

    tokens: Tokens | None = None
    tls: ServerTls | None = None
    listener: str = SERVER  # what we are
    run: str = ""  # that we have, once it is known
    max_pending: int = 64

    def let_in(self, visitor: "Visitor") -> Conversation[Peer | None]:
        """Find out who somebody is; None where nobody asks.

        Raises:
            AuthError, ProtocolError: it has not shown what it must.
        """
        if self.tokens is not None:
            return (
                yield from server_authenticate(
                    visitor, self.tokens, listener=self.listener, run=self.run
                )
            )
        yield visitor
        if visitor.arrived and visitor.arrived[0].type is MessageType.AUTHENTICATE:
            raise AuthError("this server has no token: leave out --token-file, or give it one")
        return None


def guard_of(node: ServerNode, listener: str, most_clients: int = 0) -> Guard:
    """Return whom a server lets in, after seeing that it is not open to everybody by mistake.

    Raises:
        ConfigError: it would be, or a file of tokens or certificates cannot be used.
    """
    tokens, tls = tokens_of(node), server_tls(node)
    if tokens is None and not node.insecure and not is_loopback(node.host):
        raise ConfigError(
            f"--host {node.host}: whoever reaches the port could take part: give --token-file (make"
            " one: python -m sfl.auth new-token FILE), or --insecure if only friends can reach it"
        )
    # All clients at once, and again; a fed server does not know yet how many there are.
    crowd = 64 + 2 * (most_clients or MOST_CLIENTS_OF_FED)
    return Guard(tokens, tls, listener, max_pending=node.max_pending or crowd)


def exposure(node: ServerNode) -> list[str]:
    """Return what to say about who can reach a server."""
    if is_loopback(node.host):
        return ["only this machine can connect; --host 0.0.0.0 lets others"]
    lines = []
    if not node.token_file:
        lines.append("warning: --insecure: whoever reaches the port can take part in the run")
    if not node.tls_cert:
        protects = "a token protects the start of a connection, not what follows; " * bool(
            node.token_file
        )
        lines.append(
            f"warning: no --tls-cert: {protects}who is on the way can read and alter what travels"
        )
    return lines


class Visitor(Link):
    """A connection that is not let in yet."""

    def __init__(self, sock: Socket, guard: Guard) -> None:
        super().__init__(guard.listener)
        sock.settimeout(0)
        self.address = address_of(sock)
        self.decoder = Decoder(LIMITS)
        self.arrived: deque[Message] = deque()
        self.deadline = time.monotonic() + LET_IN_WITHIN_S
        self.leaves = False  # it has been told why it is not let in
        self.is_secured = guard.tls is None
        self.stream = Stream(sock)
        self.talk = guard.let_in(self)
        next(self.talk)

    def secure(self, tls: ServerTls) -> int:
        """Go on with TLS's handshake; return for what to wait, 0 if it is done.

        Raises:
            AuthError: the peer does not speak TLS.
            ConnectionLost: it is gone.
        """
        try:
            if isinstance(self.stream.sock, ssl.SSLSocket):
                wanted = self.stream.shake_hands()
            elif speaks_tls(self.stream.sock):
                self.stream, self.certificate = (
                    to_client(self.stream.sock, tls.context),
                    tls.certificate,
                )
                wanted = self.stream.shake_hands()
            else:
                raise AuthError("this server speaks TLS alone: give --tls-ca")
        except ssl.SSLError as error:
            raise ConnectionLost(f"no TLS: {why(error)}") from error
        self.is_secured = not wanted
        return wanted

    def receive(self) -> None:
        """Take some of what has come.

        Raises:
            ProtocolError: it is too much.
            ConnectionLost: the peer is gone.
            BlockingIOError: nothing has come.
        """
        room = MAX_BYTES - self.counters.bytes_received
        if not room:
            raise ProtocolError(
                f"at most {MAX_BYTES} bytes may come before who sends them is known"
            )
        with self.decoder.get_buffer() as buffer:
            num_bytes = self.stream.receive_now(buffer[:room])
        if not num_bytes:
            raise ConnectionLost("closed the connection")
        self.decoder.advance(num_bytes)
        self.counters.bytes_received += num_bytes

    def go_on(self) -> bool:
        """Go on with what has come; return whether it is let in.

        Raises:
            AuthError, ProtocolError, ConnectionLost: it is not.
        """
        try:
            while (message := self.decoder.next_message()) is not None:
                self.arrived.append(message)
                next(self.talk)
        except StopIteration as end:
            self.proved = end.value
            return True
        return False

    def _send(self, message: Message) -> int:
        data = encode_head(message)
        if self.stream.send_now([memoryview(data)]) < len(data):
            raise ConnectionLost("takes nothing")
        self.counters.messages_sent += 1
        self.counters.bytes_sent += len(data)
        return len(data)

    def _next(self) -> Message:
        self.counters.messages_received += 1
        return self.arrived.popleft()

    def dismiss(self, reason: str) -> None:
        """Say why it is not let in; what it still sends is thrown away until it closes."""
        self.leaves, self.deadline = True, time.monotonic() + FAREWELL_S
        with contextlib.suppress(OSError, SflError):
            self.send_message_as_json(MessageType.INVALID_MESSAGE, content=one_line(reason))
        self.stream.shut_sending()


class Doorstep:
    """The thread that accepts connections, and hands on those that are let in."""

    def __init__(
        self,
        listener: Listener,
        guard: Guard,
        admit: Callable[[Visitor], None],
        note: Callable[[str], None],
    ) -> None:
        """``admit`` is given each connection that is let in; ``note`` why others are not."""
        listener.do_not_wait()
        self._listener, self._guard, self._admit, self._notes = listener, guard, admit, _Notes(note)
        self._visitors: set[Visitor] = set()
        self._selector = selectors.DefaultSelector()
        self._closing, self._closed = socket.socketpair()
        self._accepts_from = self._looked_at = 0.0  # a time; the former after a crowd has come
        self._thread = threading.Thread(target=self._run, name="doorstep", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and send everybody away who is not let in yet."""
        self._closing.close()
        self._thread.join()

    def _run(self) -> None:
        self._selector.register(self._closed, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        try:
            while True:
                for key, _ in self._selector.select(min(LOOK_EVERY_S, self._pause_s)):
                    if key.fileobj is self._closed:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.data in self._visitors:  # and not just sent away for another one
                        self._attend(key.data)
                self._look_at_the_time()
        finally:
            for visitor in list(self._visitors):
                self._let_go(visitor)
            self._listener.close()
            self._selector.close()
            self._closed.close()

    def _accept(self) -> None:
        accepted = 0
        while accepted < ACCEPTED_AT_ONCE and (sock := self._listener.accept_now()):
            accepted += 1
            while len(self._visitors) >= self._guard.max_pending:
                self._make_room()
            try:
                visitor = Visitor(sock, self._guard)
            except OSError:
                sock.close()
                continue
            self._visitors.add(visitor)
            self._selector.register(visitor.stream.sock, selectors.EVENT_READ, visitor)
        self._selector.unregister(self._listener)
        self._accepts_from = time.monotonic() + accepted / ACCEPTED_PER_S

    def _make_room(self) -> None:
        leaving = [visitor for visitor in self._visitors if visitor.leaves]
        visitor = random.choice(leaving or list(self._visitors))
        self._notes.add(visitor, "made room for others")
        self._let_go(visitor)

    def _attend(self, visitor: Visitor) -> None:
        """See to one of whom something has come."""
        try:
            if visitor.leaves:
                if not visitor.stream.receive_now(memoryview(bytearray(65536))):
                    self._let_go(visitor)
                return
            if self._guard.tls and not visitor.is_secured:
                wanted = visitor.secure(self._guard.tls)
                events = selectors.EVENT_WRITE if wanted == WRITE else selectors.EVENT_READ
                self._selector.modify(visitor.stream.sock, events, visitor)
            while visitor.is_secured:
                visitor.receive()
                if visitor.go_on():
                    self._let_in(visitor)
                    return
        except BlockingIOError:
            return
        except (OSError, SflError) as error:
            self._refuse(visitor, error)

    def _refuse(self, visitor: Visitor, error: OSError | SflError) -> None:
        if visitor.leaves:
            self._let_go(visitor)
            return
        self._notes.add(visitor, reason_of(error))
        if isinstance(error, ConnectionLost | OSError):
            self._let_go(visitor)
        else:
            visitor.dismiss(str(error))

    def _let_in(self, visitor: Visitor) -> None:
        self._visitors.discard(visitor)
        self._selector.unregister(visitor.stream.sock)
        try:
            self._admit(visitor)
        except (OSError, RuntimeError):  # it is gone again, or no thread is left for it
            visitor.stream.close()

    def _let_go(self, visitor: Visitor) -> None:
        self._visitors.discard(visitor)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(visitor.stream.sock)
        visitor.stream.close()

    def _look_at_the_time(self) -> None:
        now = time.monotonic()
        if now >= self._accepts_from and self._listener not in self._selector.get_map():
            self._selector.register(self._listener, selectors.EVENT_READ)
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        for visitor in [v for v in self._visitors if now > v.deadline]:
            if visitor.leaves:
                self._let_go(visitor)
            else:
                self._refuse(visitor, ProtocolError(f"register within {LET_IN_WITHIN_S:g} seconds"))
        self._notes.look_at_the_time(now)

    @property
    def _pause_s(self) -> float:
        """For how long to wait, at most, until connections are accepted again."""
        return max(self._accepts_from - time.monotonic(), 0) or LOOK_EVERY_S


class _Notes:
    """Lines about who is turned away, but not one for each of a crowd."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._began_at = time.monotonic()
        self._noted = self._untold = 0

    def add(self, visitor: Visitor, reason: str) -> None:
        if self._noted < NOTES_AT_ONCE:
            self._noted += 1
            self._note(f"turned away {visitor.address}: {one_line(reason)}")
        else:
            self._untold += 1

    def look_at_the_time(self, now: float) -> None:
        if now - self._began_at < NOTES_EVERY_S:
            return
        if self._untold:
            self._note(f"turned away {self._untold} more connections in {NOTES_EVERY_S:g} seconds")
        self._began_at, self._noted, self._untold = now, 0, 0
