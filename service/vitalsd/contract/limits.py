"""
The limits of requests and answers; docs/reliability.md has them as a table, which a test compares.

"Each kind of client" are the owner over the Unix socket, the owner over TCP, and all other users; see
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

TARGET_BYTES = 2048  # Path and query together; beyond it 414.
HEAD_BYTES = 16 * 1024  # Beyond it 431.
HEADERS = 64  # Beyond it 431.
BODY_BYTES = 4096  # Beyond it 413.
REPORT_BODY_BYTES = 16 * 1024  # Of POST /report.zip, which has the user's message in it.
REQUEST_S = 5.0  # For a request to arrive whole, from the start of the connection or from the answer before it.
BAD_TOKENS_PER_S = 10  # Wrong tokens that are answered as such; further ones in that second are 429.

# Parameters and bodies

WINDOW_MS = (10, 60_000)  # Lowest and highest window_ms and interval_ms.
HISTORY_SECONDS = (1, 86_400)
STEP_MS = (0, 3_600_000)
LABEL_CHARACTERS = 200  # Of a mark.

# Connections

CONNECTIONS = 1024  # Of each kind of client.
DESCRIPTOR_SHARE = 4  # But at most a quarter of the descriptors that the process may have.
OTHER_USERS_CONNECTIONS = 32  # A scraper has one or two; more would delay the owner, because one loop answers all.
WRITE_S = 10.0  # A client that takes neither all of its answer nor WRITE_BYTES of it in this time is disconnected.
WRITE_BYTES = 64 * 1024
CLOSING_CONNECTIONS = 32  # Of each kind of client, kept open until the client has read its report.
CLOSE_S = 10.0  # After the last byte of a report, for the client to close its half of the connection.
SEND_BUDGET_BYTES = 32 << 20  # Of large answers that clients of one kind have yet to take; beyond it 503.
SEND_BYTES_PER_S = 32 * 1024  # A client takes a large answer at this rate, after WRITE_S, or is disconnected.

# Work at the same time, of each kind of client

WINDOWS = 64  # Of one process. Clients that share a window use one each.
OTHER_PROCESSES = 32  # Sampled besides the target.
STREAMS = 8
STREAM_S = 3600.0  # An EventSource opens the next one by itself; a forgotten stream ends.
STREAM_QUEUE = 16  # Measurements that wait for a slow reader of a stream; then the oldest is dropped.
WAITING_ANSWERS = 16  # A large table takes over a second: later requests would wait longer than clients do.

# Answers

ANSWER_THREADS = 20_000  # The idlest threads beyond it are left out.
ANSWER_BYTES = 8 << 20
HISTORY_ROWS = 10_000  # More rows are put together into longer ones.
HISTORY_CELLS = 1_000_000  # Rows times threads, some 8 MiB of JSON; the idlest threads beyond it are left out.
DETAIL_CHARACTERS = 400  # Of a problem, which so stays under 1 KiB.

# The log

LOG_LINE_S = 1.0  # One line of a kind in this time; the others are counted.
LOG_TRACEBACK_S = 60.0
