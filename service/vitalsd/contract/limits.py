"""
Define the limits of requests and answers; a test compares them with the table in docs/reliability.md.

The kinds of client are the owner over the Unix socket, the owner over TCP, and all other users; see
`vitalsd.admission.Shares`.
"""

__all__ = [
    "ANSWER_BYTES",
    "ANSWER_THREADS",
    "BAD_TOKENS_PER_S",
    "BODY_BYTES",
    "CLOSE_S",
    "CLOSING_CONNECTIONS",
    "CONNECTIONS",
    "DESCRIPTOR_SHARE",
    "DETAIL_CHARACTERS",
    "HEADERS",
    "HEAD_BYTES",
    "HISTORY_CELLS",
    "HISTORY_GAUGES",
    "HISTORY_ROWS",
    "HISTORY_SECONDS",
    "LABEL_CHARACTERS",
    "LOG_LINE_S",
    "LOG_TRACEBACK_S",
    "OTHER_PROCESSES",
    "OTHER_USERS_CONNECTIONS",
    "REPORT_BODY_BYTES",
    "REQUEST_S",
    "SEND_BUDGET_BYTES",
    "SEND_BYTES_PER_S",
    "STEP_MS",
    "STREAMS",
    "STREAM_QUEUE",
    "STREAM_S",
    "TARGET_BYTES",
    "WAITING_ANSWERS",
    "WINDOWS",
    "WINDOW_MS",
    "WRITE_BYTES",
    "WRITE_S",
]

# Requests

TARGET_BYTES = 2048  # Path and query together; a longer target is answered with 414.
HEAD_BYTES = 16 * 1024  # Bytes of the head of a request; more are answered with 431.
HEADERS = 64  # Headers of a request; more are answered with 431.
BODY_BYTES = 4096  # Bytes of the body of a request; more are answered with 413.
REPORT_BODY_BYTES = 16 * 1024  # Bytes of the body of POST /report.zip, which contains the user's message.
REQUEST_S = 5.0  # Time for a whole request to arrive, from the start of the connection or the answer before it.
BAD_TOKENS_PER_S = 10  # Wrong tokens that are answered with 401; further ones in that second are answered with 429.

# Parameters and bodies

WINDOW_MS = (10, 60_000)  # Lowest and highest window_ms and interval_ms.
HISTORY_SECONDS = (1, 86_400)  # Lowest and highest seconds of a history.
STEP_MS = (0, 3_600_000)  # Lowest and highest step_ms of a history.
LABEL_CHARACTERS = 200  # Characters of the label of a mark.

# Connections

CONNECTIONS = 1024  # Connections of each kind of client.
DESCRIPTOR_SHARE = 4  # Connections take at most a quarter of the descriptors that the process may have.
OTHER_USERS_CONNECTIONS = 32  # A scraper has one or two; more would delay the owner, because one loop answers all.
WRITE_S = 10.0  # A client that takes neither all of its answer nor WRITE_BYTES of it in this time is disconnected.
WRITE_BYTES = 64 * 1024  # Bytes that a client has to take in WRITE_S.
CLOSING_CONNECTIONS = 32  # Connections of each kind of client, kept open until the client has read its report.
CLOSE_S = 10.0  # Time for the client to close its half of the connection, after the last byte of a report.
SEND_BUDGET_BYTES = 32 << 20  # Unsent bytes of large answers for clients of one kind; more are answered with 503.
SEND_BYTES_PER_S = 32 * 1024  # A client takes a large answer at this rate, after WRITE_S, or is disconnected.

# Work at the same time, of each kind of client

WINDOWS = 64  # Windows of one process. Clients that share a window use one each.
OTHER_PROCESSES = 32  # Processes that are sampled besides the target.
STREAMS = 8  # Streams of each kind of client.
STREAM_S = 3600.0  # Lifetime of a stream, so that a forgotten one ends; an EventSource then opens the next by itself.
STREAM_QUEUE = 16  # Measurements that wait for a slow reader of a stream; then the oldest is dropped.
WAITING_ANSWERS = 16  # A large table takes over a second: a client would give up on later requests.

# Answers

ANSWER_THREADS = 20_000  # Threads of an answer; the idlest others are left out.
ANSWER_BYTES = 8 << 20  # Bytes of an answer; the idlest threads are left out of a larger one.
HISTORY_ROWS = 10_000  # Rows of a history; more rows are merged into longer ones.
HISTORY_CELLS = 1_000_000  # Numbers of threads, children and gauges, some 8 MiB; the idlest others are left out.
HISTORY_GAUGES = 64  # Gauges of a history; those that have had no value for the longest are left out.
DETAIL_CHARACTERS = 400  # Characters of the detail of a problem, which therefore stays under 1 KiB.

# The log

LOG_LINE_S = 1.0  # Interval of lines of one kind, s; those in between are counted.
LOG_TRACEBACK_S = 60.0  # Interval of tracebacks of one kind, s.
