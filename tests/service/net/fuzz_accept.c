/* The filter against clients that send anything in any pieces: what is handed over and what can
 * still be read of it are together what the client sent. Under ASan and UBSan, and under TSan.
 *
 *     fuzz_accept SEED CONNECTIONS */
#include "accept.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define AT_ONCE 32
#define LONGEST 9000

static unsigned long long state;

static unsigned chance(unsigned below) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return (unsigned)(state >> 33) % below;
}

static const char *const PIECES[] = {
    "GET / HTTP/1.1\r\n", "POST /v1/a HTTP/1.1\r\n", "POST / HTTP/1.0\r\n", "host: a\r\n",
    "content-length: 5\r\n", "Content-Length:0\r\n", "content-length: 700\r\n",
    "content-length: 99999999999999999999\r\n", "content-length: -1\r\n", "content-length:\r\n",
    "transfer-encoding: chunked\r\n", "expect: 100-continue\r\n", "x: y\n", " folded\r\n", ":\r\n",
    "\r\n", "\r\n\r\n", "\r", "\n", "hello", "a: ", "5\r\nhello\r\n0\r\n\r\n", "HTTP/1.1", " ", "PRI * HTTP/2.0\r\n",
};

struct client {
    int fd, port, done; /* sent, and nothing more to send */
    int kept;           /* its end is kept open until the filter ends it */
    size_t size, sent;
    char bytes[LONGEST];
};

static struct client clients[AT_ONCE];

static void die(const char *what) {
    fprintf(stderr, "%s\n", what);
    abort();
}

static const char *const STALLED[] = {
    "GET / HTTP/1.1\r\nhost: a\r\nx: ",
    "POST /v1/a HTTP/1.1\r\nhost: a\r\ncontent-length: 500\r\n\r\nabc",
    "POST / HTTP/1.1\r\nhost: a\r\nContent-Length: 600 \r\n\r\n",
};

/* Those who stall; and requests, and what breaks them. */
static void invent(struct client *c) {
    if (chance(4) == 0) {
        c->size = (size_t)snprintf(c->bytes, LONGEST, "%s", STALLED[chance(3)]);
        return;
    }
    unsigned pieces = 1 + chance(8);
    if (chance(4)) c->size = (size_t)snprintf(c->bytes, LONGEST, "%s", PIECES[chance(3)]);
    for (unsigned i = 0; i < pieces; i++) {
        const char *piece = PIECES[chance(sizeof PIECES / sizeof *PIECES)];
        size_t size = strlen(piece);
        if (c->size + size > LONGEST / 2) break;
        memcpy(c->bytes + c->size, piece, size);
        c->size += size;
    }
    if (chance(2)) c->size += (size_t)snprintf(c->bytes + c->size, 8, "\r\n\r\n");
    unsigned more = chance(8) ? chance(40) : chance(LONGEST / 2 - 8);
    for (unsigned i = 0; i < more; i++) c->bytes[c->size++] = (char)chance(256);
    if (!chance(5)) c->bytes[chance((unsigned)c->size)] ^= (char)(1 << chance(8));
}

static void come(struct client *c, const struct sockaddr_in *where) {
    struct sockaddr_in own;
    socklen_t size = sizeof own;
    memset(c, 0, sizeof *c);
    invent(c);
    c->kept = chance(3) == 0;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(c->fd, (const struct sockaddr *)where, sizeof *where)) die("connect");
    getsockname(c->fd, (struct sockaddr *)&own, &size);
    c->port = own.sin_port;
}

static void some(struct client *c) {
    if (c->done) return;
    size_t left = c->size - c->sent, piece = chance(4) ? chance(30) + 1 : left;
    if (piece > left) piece = left;
    ssize_t sent = send(c->fd, c->bytes + c->sent, piece, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0) c->sent += (size_t)sent;
    if (c->sent < c->size && (sent >= 0 || errno == EAGAIN)) return;
    c->done = 1;
    if (!c->kept) shutdown(c->fd, SHUT_WR);
}

static struct client *whose(int fd) {
    struct sockaddr_in peer;
    socklen_t size = sizeof peer;
    if (getpeername(fd, (struct sockaddr *)&peer, &size)) return NULL;
    for (int i = 0; i < AT_ONCE; i++)
        if (clients[i].port == peer.sin_port) return &clients[i];
    return NULL; /* it left before it was taken */
}

/* What came and what follows are what was sent. */
static void compare(const struct taken *one) {
    struct client *c = whose(one->fd);
    if (!c) return;
    if (one->size > c->sent || (one->size && memcmp(one->bytes, c->bytes, one->size)))
        die("other bytes");
    while (!c->done) some(c);
    if (c->kept) shutdown(c->fd, SHUT_WR);
    char rest[LONGEST + 1];
    size_t size = 0;
    struct pollfd wait = {one->fd, POLLIN, 0};
    while (poll(&wait, 1, 5000) == 1) {
        ssize_t got = recv(one->fd, rest + size, sizeof rest - size, 0);
        if (got < 0) die("recv");
        if (!got) break;
        size += (size_t)got;
    }
    if (one->size + size != c->sent) die("bytes were lost, or came twice");
    if (memcmp(rest, c->bytes + one->size, size)) die("other bytes follow");
    c->port = -1;
}

static int taken(struct filter *f) {
    struct taken batch[8];
    int all = 0;
    for (int count; (count = accept_take(f, batch, 8)); all += count)
        for (int i = 0; i < count; i++) {
            compare(&batch[i]);
            close(batch[i].fd);
        }
    return all;
}

static struct reply reply_of(const char *text) {
    const char *id = strstr(text, "################"), *date = strchr(text, '@');
    return (struct reply){text, strlen(text), id ? (size_t)(id - text) : 0,
                          date ? (size_t)(date - text) : 0};
}

int main(int argc, char **argv) {
    state = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    int left = argc > 2 ? atoi(argv[2]) : 2000;
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof where;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(listener, (struct sockaddr *)&where, size) || listen(listener, 64)) die("listen");
    getsockname(listener, (struct sockaddr *)&where, &size);
    struct rules rules = {
        .head_seconds = 0.1, .grace_seconds = 0.1, .silence_seconds = 0.05, .bytes_per_second = 1e4,
        .linger_seconds = 0.05, .linger_bytes = 100, .head_bytes = 2000, .body_bytes = 600,
        .all_bytes = 30000, .max_open = AT_ONCE - 4, .id_prefix = "0123456789",
        .late = reply_of("HTTP/1.1 408 R\r\nid: ################\r\n"
                         "date: @@@@@@@@@@@@@@@@@@@@@@@@@@@@@\r\n\r\n"),
        .stopping = reply_of("HTTP/1.1 503 S\r\n\r\n"),
    };
    rules.late_v1 = rules.late;
    struct counts counts = {0};
    struct filter *f = accept_start(&rules, &counts, &listener, 1);
    if (!f) die("start");
    int given = 0, all = left;
    for (int i = 0; i < AT_ONCE; i++) come(&clients[i], &where);
    while (left > 0) {
        for (int i = 0; i < AT_ONCE; i++) {
            struct client *c = &clients[i];
            struct pollfd ended = {c->fd, POLLIN, 0};
            some(c);
            if (c->port >= 0 && !(c->done && (poll(&ended, 1, 0) || !chance(3000)))) continue;
            close(c->fd);
            come(c, &where);
            left--;
        }
        given += taken(f);
        if (!chance(4)) usleep(500);
    }
    accept_stop(f);
    given += taken(f);
    for (int i = 0; i < AT_ONCE; i++) close(clients[i].fd);
    accept_end(f);
    if (counts.held || counts.bytes) die("something is still held");
    printf("%d connections, %d handed over, %lld heads closed, %lld bodies refused\n", all, given,
           (long long)counts.closed, (long long)counts.late);
    return given > all / 4 && counts.late && counts.closed ? 0 : 1;
}
