"""The questions and answers of the control socket, as typed JSON. Sans-IO.

A question is one JSON object with ``schema`` and ``command``, an answer one with ``schema``
and ``kind``. Within schema 1 fields and commands are added, never changed or removed, and
fields one does not know are ignored; so an older and a newer end understand each other.
"""

# No postponed annotations here: msgspec reads them when a class is made.
from datetime import datetime
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Struct

from syncd.control.escape import printable, well_formed
from syncd.errors import ControlError

SCHEMA = 1

# The longest question: room for a path and a JID many times over.
MAX_REQUEST = 64 * 1024  # bytes

# The longest answer. About 300 bytes tell of a transfer or a peer, so this is thousands.
MAX_REPLY = 4 * 1024 * 1024  # bytes

# How much of what we were asked is worth repeating in an error.
_MAX_QUOTED = 40  # characters

# Of the reason why a message is malformed; the place that it names comes last, and is lost
# only behind a value that fills all of it.
_MAX_REASON = 200  # characters

Moment: TypeAlias = Annotated[datetime, msgspec.Meta(tz=True)]
"""A point in time, in UTC, so that JSON shows it with a final ``Z`` (ISO 8601)."""

Natural: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
"""A count, or a number of bytes."""

State: TypeAlias = Literal["ok", "waiting", "problem"]
"""``ok``: everything is delivered; ``waiting``: it will be; ``problem``: a person must act."""

_SKEW = "use the syncctl and the syncd of one installation, and restart syncd after an upgrade"


class StatusRequest(Struct, frozen=True, kw_only=True, tag_field="command", tag="status"):
    """Asks how everything stands; answered by `Status`, at once."""

    schema: int = SCHEMA


class RescanRequest(Struct, frozen=True, kw_only=True, tag_field="command", tag="rescan"):
    """Asks to look through all folders now; answered by `Rescanned` when that is done.

    After the answer every file that lay in a folder when the question came is counted in
    `Status`: as pending, as settling, or as delivered.
    """

    schema: int = SCHEMA


class PingRequest(Struct, frozen=True, kw_only=True, tag_field="command", tag="ping"):
    """Asks for a sign of life; answered by `Pong`."""

    schema: int = SCHEMA


class LimitRequest(Struct, frozen=True, kw_only=True, tag_field="command", tag="limit"):
    """Asks to change how fast bytes may flow, until the daemon ends; answered by `Limited`.

    Attributes:
      peer: For this peer only: a bare JID; empty: for all together.
      up: Bytes per second from the daemon; 0 lifts the limit, None leaves it.
      down: Bytes per second to the daemon, likewise.
    """

    schema: int = SCHEMA
    peer: str = ""
    up: Natural | None = None
    down: Natural | None = None


class SendRequest(Struct, frozen=True, kw_only=True, tag_field="command", tag="send"):
    """Asks to send one file outside any folder; answered by `Standing` once that is owed.

    From then on it is as safe as a file in a folder: it is sent when the peer is there, after
    a restart as well. A file that was sent before is sent again.

    Attributes:
      path: Of the file, absolute.
      peer: To whom: a JID, as configured.
    """

    schema: int = SCHEMA
    path: str
    peer: str


class StandingRequest(Struct, frozen=True, kw_only=True, tag_field="command", tag="standing"):
    """Asks what has become of a `SendRequest`; answered by `Standing`.

    Attributes:
      path: As in that request.
      peer: As in that request.
    """

    schema: int = SCHEMA
    path: str
    peer: str


class PeerRequest(Struct, frozen=True, kw_only=True, tag_field="command", tag="peer"):
    """Asks about the keys of peers, or decides about one; answered by `Keys`.

    Attributes:
      action: ``list``: all, and ours; ``show``: one; ``verify``: a person has compared the
        words or the fingerprints; ``reset-key``: forget it, and trust the next one on first
        use; ``block``: nothing goes to or comes from this peer.
      peer: Whose: a bare JID; empty only to list.
      fingerprint: For ``verify``: what was compared, or the key might be another by now.
    """

    schema: int = SCHEMA
    action: Literal["list", "show", "verify", "reset-key", "block"]
    peer: str = ""
    fingerprint: str = ""


class KeyRequest(Struct, frozen=True, kw_only=True, tag_field="command", tag="key"):
    """Asks about our own key; answered by `Keys`, which then has nobody else's.

    Attributes:
      action: ``show``: nothing changes; ``rotate``: another one takes its place, which it
        signs, so that peers who know it take the new one over by themselves.
    """

    schema: int = SCHEMA
    action: Literal["show", "rotate"]


class LimitStatus(Struct, frozen=True, kw_only=True):
    """How fast bytes may flow.

    Attributes:
      up: Bytes per second from here; 0: no limit.
      down: Bytes per second to here; 0: no limit.
    """

    up: Natural = 0
    down: Natural = 0


class Connection(Struct, frozen=True, kw_only=True):
    """Our own connection to the XMPP server.

    Attributes:
      state: ``connected``; ``connecting``; ``offline``: it failed and is tried again;
        ``unauthorized``: the server does not take our credentials; ``refused``: anything
        else that only a person can change, such as a certificate nobody trusts.
      jid: Our address: the full JID once bound, before that the configured one.
      server: Where we are or try to be connected: a domain, or ``host:port``.
      since: Since when the state is what it is.
      reason: Why not connected, as a sentence; empty when connected.
      hint: What to do about it; empty when it passes by itself.
    """

    state: Literal["connected", "connecting", "offline", "unauthorized", "refused"]
    jid: str
    server: str
    since: Moment | None = None
    reason: str = ""
    hint: str = ""


class FolderStatus(Struct, frozen=True, kw_only=True):
    """One watched folder.

    Attributes:
      id: Its id, the same at both ends.
      path: Where it lies here.
      send_to: The peers its files go to: JIDs.
      accept_from: The peers whose files it takes: JIDs.
      files: How many files it holds.
      pending: How many of them are not yet at every peer they go to.
      settling: How many files have just changed and are not yet considered whole.
      scanning: Whether the first scan since the start, or one that was asked for, still runs.
      problem: Why the folder cannot be used, as a sentence; empty when it can.
      hint: What to do about the problem.
    """

    id: str
    path: str
    send_to: tuple[str, ...]
    accept_from: tuple[str, ...]
    files: Natural
    pending: Natural
    settling: Natural = 0
    scanning: bool = False
    problem: str = ""
    hint: str = ""


class PeerStatus(Struct, frozen=True, kw_only=True):
    """One peer, and the deliveries to it; a delivery is one file to one peer.

    Attributes:
      jid: Its address as configured.
      online: Whether a resource that takes files is there.
      resource: That resource; empty when offline.
      encryption: What the next transfer uses: ``plain``, or how far its key is trusted.
      pending: Deliveries owed, parked ones included.
      pending_bytes: How long the files of these are together.
      parked: Deliveries that are not tried again until a person has acted.
      delivered: Deliveries the peer has confirmed with a receipt.
      sent: Deliveries to a peer that knows no receipts: every byte was written.
      since: Since when it is online, or offline.
      next_try: When the next delivery is tried again, if it waits for that.
      last_error: The last error with this peer, as a sentence; empty if none.
      problem: What stands in the way until a person acts, as a sentence; empty if nothing.
      hint: What to do about the problem.
      limit: How fast bytes may flow to and from this peer; those of all hold as well.
    """

    jid: str
    online: bool
    resource: str
    encryption: str
    pending: Natural
    delivered: Natural
    last_error: str = ""
    pending_bytes: Natural = 0
    parked: Natural = 0
    sent: Natural = 0
    since: Moment | None = None
    next_try: Moment | None = None
    problem: str = ""
    hint: str = ""
    limit: LimitStatus = LimitStatus()


class TransferStatus(Struct, frozen=True, kw_only=True):
    """One file on its way now.

    Attributes:
      direction: ``send`` from here, or ``receive`` to here.
      peer: The other end: a full JID, as far as known.
      folder: The folder's id; empty for a file outside any folder.
      path: The file's path within the folder, with ``/``; or its name.
      size: Its whole length in bytes.
      offset: How many bytes of it are at the receiver.
      method: How the bytes travel; None until both ends have settled on a way.
      rate: Bytes a second, lately.
    """

    direction: Literal["send", "receive"]
    peer: str
    folder: str
    path: str
    size: Natural
    offset: Natural
    method: Literal["direct", "proxy", "ibb"] | None
    rate: Natural


class ErrorStatus(Struct, frozen=True, kw_only=True):
    """One of the last errors; it may be over by now.

    Attributes:
      time: When it happened.
      text: What happened and why, as a sentence.
      hint: What to do about it; empty when it passes by itself.
      peer: With whom: a JID; empty if it is nobody's.
      folder: The folder's id, or empty.
      path: The file, or empty.
    """

    time: Moment
    text: str
    hint: str
    peer: str = ""
    folder: str = ""
    path: str = ""


class ProxyStatus(Struct, frozen=True, kw_only=True):
    """A SOCKS5 proxy, or a server that should have one.

    Attributes:
      jid: Its address.
      usable: Whether it can be offered to peers.
      text: What is known of it, as a sentence.
      hint: What to do about it, or who must; empty if nothing.
    """

    jid: str
    usable: bool
    text: str
    hint: str = ""


class Status(Struct, frozen=True, kw_only=True, tag_field="kind", tag="status"):
    """How everything stands; also what ``syncctl status --json`` prints.

    Attributes:
      schema: The version of this object.
      state: As `syncd.control.summary.summarise` decides.
      summary: The state and its reason in one line for people.
      version: The daemon's version.
      started: When the daemon started.
      connection: Ours to the XMPP server.
      folders: All folders, as configured.
      peers: All peers of all folders.
      transfers: What moves now.
      errors: The last ones, newest first, a bounded number.
      limit: How fast bytes may flow, to and from all peers together.
      proxies: Those that files may go through where no direct way leads.
      counted: When the numbers of deliveries were true: earlier than now if the disk of the
        state directory takes its time.
    """

    schema: int = SCHEMA
    state: State
    summary: str
    version: str
    started: Moment
    connection: Connection
    folders: tuple[FolderStatus, ...]
    peers: tuple[PeerStatus, ...]
    transfers: tuple[TransferStatus, ...]
    errors: tuple[ErrorStatus, ...]
    limit: LimitStatus = LimitStatus()
    proxies: tuple[ProxyStatus, ...] = ()
    counted: Moment | None = None


class Rescanned(Struct, frozen=True, kw_only=True, tag_field="kind", tag="rescanned"):
    """The folders were looked through.

    Attributes:
      files: How many files they hold together.
    """

    schema: int = SCHEMA
    files: Natural


class Pong(Struct, frozen=True, kw_only=True, tag_field="kind", tag="pong"):
    """A sign of life.

    Attributes:
      version: The daemon's version.
      pid: Its process id.
    """

    schema: int = SCHEMA
    version: str
    pid: Natural


class Limited(Struct, frozen=True, kw_only=True, tag_field="kind", tag="limited"):
    """How fast bytes may flow from now on.

    Attributes:
      peer: To and from this peer; empty: all together.
      limit: The limits.
    """

    schema: int = SCHEMA
    peer: str
    limit: LimitStatus


class Standing(Struct, frozen=True, kw_only=True, tag_field="kind", tag="standing"):
    """What has become of a file that was to be sent.

    Attributes:
      state: ``pending``; ``parked``: a person must act; ``delivered``: the peer confirmed it;
        ``sent``: to a client that confirms nothing, every byte; ``dropped``: the file went
        away before.
      online: Whether the peer is there.
      error: Why it is not there yet, or not any more, as a sentence; empty if nothing failed.
      hint: What to do about it.
    """

    schema: int = SCHEMA
    state: Literal["pending", "parked", "delivered", "sent", "dropped"]
    online: bool
    error: str = ""
    hint: str = ""


class Key(Struct, frozen=True, kw_only=True):
    """The key of a peer.

    Attributes:
      peer: A bare JID.
      state: ``unverified``: trusted on first use; ``verified``: a person has compared it;
        ``blocked``; ``changed``: the peer shows another one, and nothing moves.
      fingerprint: For people to compare: hexadecimal, in groups.
      words: The same for the telephone: both ends show the same ones.
      first_seen: When the peer first showed it.
      last_seen: When it last did.
      verified_at: When a person compared it.
      offered: If it changed: the fingerprint of what the peer shows now.
    """

    peer: str
    state: Literal["unverified", "verified", "blocked", "changed"]
    fingerprint: str
    words: tuple[str, ...]
    first_seen: Moment
    last_seen: Moment
    verified_at: Moment | None = None
    offered: str = ""


class Keys(Struct, frozen=True, kw_only=True, tag_field="kind", tag="keys"):
    """Keys, as they are after what was asked for.

    Attributes:
      own: The fingerprint of our own.
      keys: Those of the peers that were asked about and have shown one.
    """

    schema: int = SCHEMA
    own: str
    keys: tuple[Key, ...]


class Refusal(Struct, frozen=True, kw_only=True, tag_field="kind", tag="refusal"):
    """The question was not answered.

    Attributes:
      code: Why, for programs; ``busy``, ``too-slow`` and ``waiting`` are worth another try.
      message: Why, as a sentence.
      hint: What to do about it, or empty.
    """

    schema: int = SCHEMA
    code: Literal["bad-request", "busy", "too-slow", "failed", "waiting", "not-found"]
    message: str
    hint: str = ""


Request: TypeAlias = (
    StatusRequest
    | RescanRequest
    | PingRequest
    | LimitRequest
    | SendRequest
    | StandingRequest
    | PeerRequest
    | KeyRequest
)
Reply: TypeAlias = Status | Rescanned | Pong | Limited | Standing | Keys | Refusal


class _Header(Struct, frozen=True, kw_only=True):
    """What a question of any schema begins with."""

    schema: int
    command: str


_header = msgspec.json.Decoder(_Header)
_request: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_reply: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)

COMMANDS = frozenset({"status", "rescan", "ping", "limit", "send", "standing", "peer", "key"})


def encode_request(request: Request) -> bytes:
    """Write a question as JSON."""
    return msgspec.json.encode(request)


def decode_request(data: bytes) -> Request:
    """Read a question that anybody may have sent.

    Args:
      data: The message as received.

    Raises:
      ControlError: It is none, or of another version; the asker is at fault.
    """
    if len(data) > MAX_REQUEST:
        raise ControlError(f"a request is at most {MAX_REQUEST} bytes long", hint=_SKEW)
    try:
        header = _header.decode(data)
        if header.schema != SCHEMA:
            raise ControlError(
                f"syncd speaks schema {SCHEMA}, not {header.schema}, on its control socket",
                hint=_SKEW,
            )
        if header.command not in COMMANDS:
            shown = printable(header.command[:_MAX_QUOTED])
            raise ControlError(f'syncd knows no command "{shown}"', hint=_SKEW)
        return _request.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ControlError(f"the request is malformed: {_why(error)}", hint=_SKEW) from error


def encode_reply(reply: Reply) -> bytes:
    """Write an answer as JSON; text that is no Unicode is written as `well_formed` shows it.

    Raises:
      ControlError: The answer would be longer than `MAX_REPLY`; the daemon is at fault.
    """
    try:
        data = msgspec.json.encode(reply)
    except UnicodeEncodeError:
        # Rare: a file name that is no UTF-8. Only then is the detour worth its time.
        data = msgspec.json.encode(_all_well_formed(msgspec.to_builtins(reply)))
    if len(data) > MAX_REPLY:
        raise ControlError(f"the answer would be longer than {MAX_REPLY} bytes")
    return data


def decode_reply(data: bytes) -> Reply:
    """Read an answer.

    Raises:
      ControlError: It is none that we understand; the daemon is of another version.
    """
    try:
        reply = _reply.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ControlError(
            f"syncd answered what this syncctl does not understand: {_why(error)}", hint=_SKEW
        ) from error
    if reply.schema != SCHEMA:
        raise ControlError(f"syncd answered in schema {reply.schema}, not {SCHEMA}", hint=_SKEW)
    return reply


def _why(error: Exception) -> str:
    # Some repeat the value that is wrong, whatever it is and however long.
    return printable(str(error)[:_MAX_REASON])


def _all_well_formed(value: object) -> object:
    match value:
        case str():
            return well_formed(value)
        case dict():
            return {key: _all_well_formed(item) for key, item in value.items()}
        case list() | tuple():
            return [_all_well_formed(item) for item in value]
        case _:
            return value
