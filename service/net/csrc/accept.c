#define _GNU_SOURCE
#include "accept.h"

#include "head.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define TICK 0.05         /* seconds: deadlines are kept to it */
#define SLOTS 256         /* ticks ahead that a deadline can be noted */
#define FIRST_BYTES 1024  /* of a newcomer's buffer */
#define ONCE_BYTES 65536  /* at most read of one client before it is another's turn */
#define EVENTS 64
#define ACCEPTED 64   /* at once, before those that are here are looked at again */
#define CUT 64        /* the same, of those whose time is up */
#define SURPLUS 64    /* beyond `max_open`, that wait for the event loop to be told so */
#define REST 0.1      /* seconds without accepting when there is no place, or no descriptor */
#define REPLY 1024    /* bytes of the longest */

/* What epoll names: the first member of whatever it points to. */
enum kind { WAKE, LISTENER, CLIENT };

struct source {
    enum kind kind;
    int fd;
};

struct listener {
    struct source source;
    int family;
};

enum phase {
    HEAD,   /* the empty line has not come. At its deadline: closed */
    BODY,   /* the head is whole, and says how long the body is. At its deadline: `late` */
    LINGER, /* refused, our side is shut; what comes is dropped. At its deadline: closed */
};

struct client {
    struct source source;
    enum phase phase;
    int family, watched, full;   /* epoll knows it; it came when `max_open` were here */
    struct client *next, **link; /* in its slot of the wheel, or (`next` only) among the ready */
    char *bytes;
    size_t size, room; /* bytes that came, and the buffer's own size */
    struct head head;
    size_t whole; /* in BODY: bytes of head and body together */
    double since, came; /* the phase began; the last byte came */
    double waited;      /* see struct taken */
    int64_t unheard;            /* in LINGER: bytes that may still come */
};

struct filter {
    struct rules rules;
    struct counts *counts;
    pthread_t thread;
    int poll, event;
    struct source wake; /* of the thread, by the other side */
    struct listener *listeners;
    int how_many, resting;
    double now, rest_until;
    long turn; /* the tick that the wheel has come to */
    struct client *wheel[SLOTS];
    int on_wheel, lingering;
    /* Shared with the other side, under `lock`. */
    pthread_mutex_t lock;
    pthread_cond_t quiet;
    struct client *ready, **ready_end;
    int stopping, stopped;
    struct client *lent; /* the batch that the other side reads: only that side touches it */
};

enum verdict { MORE, GIVE, GONE }; /* wait for more; hand it over; close it */

static void add(void *count, int by) {
    atomic_fetch_add_explicit((_Atomic int32_t *)count, by, memory_order_relaxed);
}

static void add_long(void *count, int64_t by) {
    atomic_fetch_add_explicit((_Atomic int64_t *)count, by, memory_order_relaxed);
}

static int64_t bytes_held(const struct filter *f) {
    return atomic_load_explicit((_Atomic int64_t *)&f->counts->bytes, memory_order_relaxed);
}

static int connections(const struct filter *f) {
    return atomic_load_explicit((_Atomic int32_t *)&f->counts->held, memory_order_relaxed) +
           atomic_load_explicit((_Atomic int32_t *)&f->counts->open, memory_order_relaxed);
}

static double clock_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- The wheel: a list of clients for each of the next ticks --------------------------------- */

static void unplace(struct filter *f, struct client *c) {
    if (!c->link) return;
    *c->link = c->next;
    if (c->next) c->next->link = c->link;
    c->link = NULL;
    f->on_wheel--;
}

static void place(struct filter *f, struct client *c, double due) {
    long tick = (long)(due / TICK) + 1;
    if (tick <= f->turn) tick = f->turn + 1;
    if (tick >= f->turn + SLOTS) tick = f->turn + SLOTS - 1; /* looked at then, and placed again */
    struct client **slot = &f->wheel[tick % SLOTS];
    c->next = *slot;
    c->link = slot;
    if (c->next) c->next->link = &c->next;
    *slot = c;
    f->on_wheel++;
}

static void place_again(struct filter *f, struct client *c, double due) {
    unplace(f, c);
    place(f, c, due);
}

static double due(const struct filter *f, const struct client *c) {
    const struct rules *r = &f->rules;
    if (c->phase == HEAD) return c->since + r->head_seconds;
    if (c->phase == LINGER) return c->since + r->linger_seconds;
    double received = (double)(c->size + (size_t)c->head.length - c->whole);
    double all = c->since + r->grace_seconds + received / r->bytes_per_second;
    double silent = c->came + r->silence_seconds;
    return all < silent ? all : silent;
}

/* ---- Clients --------------------------------------------------------------------------------- */

/* Before it is closed, too: a child between fork and exec has the same descriptors, and epoll would
 * go on to tell of what is freed here. */
static void unwatch(struct filter *f, struct client *c) {
    if (c->watched) epoll_ctl(f->poll, EPOLL_CTL_DEL, c->source.fd, NULL);
    c->watched = 0;
}

static void drop_bytes(struct filter *f, struct client *c) {
    add_long(&f->counts->bytes, -(int64_t)c->room);
    free(c->bytes);
    c->bytes = NULL;
    c->size = c->room = 0;
}

static void leave(struct filter *f, struct client *c) {
    unplace(f, c);
    unwatch(f, c);
    if (c->phase == LINGER) f->lingering--;
    close(c->source.fd);
    drop_bytes(f, c);
    add(&f->counts->held, -1);
    free(c);
}

static void give(struct filter *f, struct client *c) {
    unplace(f, c);
    unwatch(f, c);
    c->next = NULL;
    pthread_mutex_lock(&f->lock);
    int first = !f->ready;
    *f->ready_end = c;
    f->ready_end = &c->next;
    pthread_mutex_unlock(&f->lock);
    if (first) eventfd_write(f->event, 1);
}

/* After bytes came. */
static enum verdict step(struct filter *f, struct client *c) {
    if (c->phase == HEAD) {
        enum look found = head_look(&c->head, c->bytes, c->size);
        if (found != HEAD_WHOLE) {
            c->waited = f->now - c->since;
            int more = found == HEAD_MORE && (int64_t)c->size <= f->rules.head_bytes;
            return more ? MORE : GIVE;
        }
        c->waited = 0;
        if (!c->head.plain || c->head.length > f->rules.body_bytes) return GIVE;
        if (c->head.length < 0) c->head.length = 0;
        c->whole = c->head.seen + (size_t)c->head.length;
        if (c->size < c->whole) {
            c->phase = BODY;
            c->since = c->came = f->now;
            place_again(f, c, due(f, c));
        }
    }
    return c->size < c->whole ? MORE : GIVE;
}

/* Room for more bytes; 0 where all together would hold too many. */
static int grow(struct filter *f, struct client *c) {
    size_t room = c->room ? 2 * c->room : FIRST_BYTES;
    if (c->phase == BODY && room > c->whole) room = c->whole;
    if (bytes_held(f) + (int64_t)(room - c->room) > f->rules.all_bytes) return 0;
    char *bytes = realloc(c->bytes, room);
    if (!bytes) return 0;
    add_long(&f->counts->bytes, (int64_t)(room - c->room));
    c->bytes = bytes;
    c->room = room;
    return 1;
}

static enum verdict hear(struct filter *f, struct client *c) {
    for (size_t before = c->size; c->size - before < ONCE_BYTES;) {
        if (c->size == c->room && !grow(f, c)) {
            c->waited = f->now - c->since;
            return GIVE;
        }
        size_t room = c->room - c->size;
        ssize_t got = recv(c->source.fd, c->bytes + c->size, room, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return MORE;
        if (got <= 0) return GONE; /* with a part of a request: there is nobody to answer */
        c->size += (size_t)got;
        c->came = f->now;
        enum verdict found = step(f, c);
        if (found != MORE || (size_t)got < room) return found;
    }
    return MORE;
}

/* In LINGER: drop what still comes. */
static enum verdict unhear(struct client *c) {
    char dropped[ONCE_BYTES];
    ssize_t got = recv(c->source.fd, dropped, sizeof dropped, 0);
    if (got < 0 && (errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK)) return MORE;
    return got <= 0 || (c->unheard -= got) < 0 ? GONE : MORE;
}

static int watch(struct filter *f, struct client *c) {
    struct epoll_event wanted = {.events = EPOLLIN, .data.ptr = c};
    if (!c->watched) c->watched = !epoll_ctl(f->poll, EPOLL_CTL_ADD, c->source.fd, &wanted);
    return c->watched;
}

static void heard(struct filter *f, struct client *c) {
    enum verdict found = c->phase == LINGER ? unhear(c) : hear(f, c);
    if (found == MORE && !watch(f, c)) found = c->phase == LINGER ? GONE : GIVE;
    if (found == GIVE) give(f, c);
    if (found == GONE) leave(f, c);
    if (found == MORE && !c->link) place(f, c, due(f, c));
}

/* ---- Refusals -------------------------------------------------------------------------------- */

/* RFC 9110's form, which is that of no locale. */
static void write_date(char *out) {
    static const char days[] = "SunMonTueWedThuFriSat";
    static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
    char text[64];
    time_t now = time(NULL);
    struct tm t;
    gmtime_r(&now, &t);
    snprintf(text, sizeof text, "%.3s, %02d %.3s %04d %02d:%02d:%02d GMT", days + 3 * t.tm_wday,
             t.tm_mday, months + 3 * t.tm_mon, t.tm_year + 1900, t.tm_hour, t.tm_min, t.tm_sec);
    memcpy(out, text, 29);
}

/* Say this and no more. With bytes unread the connection would be reset, and the reply lost. */
static void refuse(struct filter *f, struct client *c, const struct reply *reply, int64_t number) {
    char text[REPLY], id[8];
    memcpy(text, reply->bytes, reply->size);
    if (reply->id_at) {
        snprintf(id, sizeof id, "%06x", (unsigned)(number & 0xffffff));
        memcpy(text + reply->id_at, f->rules.id_prefix, sizeof f->rules.id_prefix);
        memcpy(text + reply->id_at + sizeof f->rules.id_prefix, id, 6);
    }
    if (reply->date_at) write_date(text + reply->date_at);
    ssize_t sent = send(c->source.fd, text, reply->size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < (ssize_t)reply->size || !watch(f, c)) {
        leave(f, c);
        return;
    }
    shutdown(c->source.fd, SHUT_WR);
    drop_bytes(f, c);
    c->phase = LINGER;
    c->since = f->now;
    c->unheard = f->rules.linger_bytes;
    f->lingering++;
    place_again(f, c, due(f, c));
}

static void refuse_late(struct filter *f, struct client *c) {
    const char *target = memchr(c->bytes, ' ', c->size);
    int v1 = target && !memcmp(target + 1, "/v1/", 4); /* a head is longer than that */
    add_long(&f->counts->late, 1);
    refuse(f, c, v1 ? &f->rules.late_v1 : &f->rules.late, f->counts->late);
}

static void too_slow(struct filter *f, struct client *c) {
    if (c->phase == BODY) {
        refuse_late(f, c);
        return;
    }
    if (c->phase == HEAD) add_long(&f->counts->closed, 1);
    leave(f, c);
}

/* Whose time is up; at most CUT of them at once. Whether there are more. */
static int expire(struct filter *f) {
    long now = (long)(f->now / TICK);
    for (int cut = 0; f->on_wheel && f->turn <= now; f->turn++) {
        struct client **slot = &f->wheel[f->turn % SLOTS], *c;
        while ((c = *slot)) {
            if (cut++ == CUT) return 1;
            if (due(f, c) <= f->now)
                too_slow(f, c);
            else
                place_again(f, c, due(f, c));
        }
    }
    return 0;
}

/* ---- Newcomers ------------------------------------------------------------------------------- */

static void newcomer(struct filter *f, int fd, int family) {
    struct client *c = calloc(1, sizeof *c);
    if (!c) {
        close(fd);
        return;
    }
    add(&f->counts->held, 1);
    c->source = (struct source){CLIENT, fd};
    c->family = family;
    c->since = c->came = f->now;
    c->head = (struct head){.length = -1, .plain = 1};
    c->full = connections(f) > f->rules.max_open;
    if (c->full)
        give(f, c);
    else
        heard(f, c);
}

static void listen_to(struct filter *f, int events) {
    for (int i = 0; i < f->how_many; i++) {
        struct epoll_event wanted = {.events = (uint32_t)events, .data.ptr = &f->listeners[i]};
        epoll_ctl(f->poll, EPOLL_CTL_MOD, f->listeners[i].source.fd, &wanted);
    }
    f->resting = !events;
    f->rest_until = f->now + REST;
}

/* Whether there may be more of them. */
static int accept_one(struct filter *f, const struct listener *l) {
    int fd = accept4(l->source.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0) {
        newcomer(f, fd, l->family);
        return 1;
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK) return 0;
    if (errno == ECONNABORTED || errno == EINTR || errno == EPROTO || errno == EPERM) return 1;
    if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
        add_long(&f->counts->starved, 1);
    listen_to(f, 0); /* whatever it is, to ask again at once would be for nothing */
    return 0;
}

static void accept_some(struct filter *f, const struct listener *l) {
    for (int i = 0; i < ACCEPTED; i++) {
        if (connections(f) > f->rules.max_open + SURPLUS) {
            listen_to(f, 0);
            return;
        }
        if (!accept_one(f, l)) return;
    }
}

/* ---- The thread ------------------------------------------------------------------------------ */

static int stop_asked(struct filter *f) {
    pthread_mutex_lock(&f->lock);
    int asked = f->stopping && !f->stopped;
    pthread_mutex_unlock(&f->lock);
    return asked;
}

/* Who came before the door closed is heard; who is not whole is told, or closed where there is no
 * request to answer. */
static void stop(struct filter *f) {
    for (int i = 0; i < f->how_many; i++) {
        struct listener *l = &f->listeners[i];
        while (accept_one(f, l) && connections(f) < 2 * f->rules.max_open) continue;
        epoll_ctl(f->poll, EPOLL_CTL_DEL, l->source.fd, NULL); /* the event loop has it, too */
        close(l->source.fd);
    }
    f->how_many = 0;
    for (int slot = 0; slot < SLOTS; slot++) {
        struct client *next;
        for (struct client *c = f->wheel[slot]; c; c = next) {
            next = c->next;
            if (c->phase == LINGER) continue;
            enum verdict found = hear(f, c);
            if (found == GIVE)
                give(f, c);
            else if (found == GONE || c->phase == HEAD)
                leave(f, c);
            else
                refuse(f, c, &f->rules.stopping, 0);
        }
    }
    pthread_mutex_lock(&f->lock);
    f->stopped = 1;
    pthread_cond_signal(&f->quiet);
    pthread_mutex_unlock(&f->lock);
}

/* Milliseconds until a deadline may have come; -1: there is none. */
static int patience(const struct filter *f) {
    double wait = f->resting ? f->rest_until - f->now : 3600;
    if (f->on_wheel) {
        long tick = f->turn;
        while (!f->wheel[tick % SLOTS] && tick < f->turn + SLOTS) tick++;
        double until = (double)tick * TICK - f->now;
        if (until < wait) wait = until;
    } else if (!f->resting) {
        return -1;
    }
    return wait > 0 ? (int)(1e3 * wait) + 1 : 0;
}

static void *run(void *given) {
    struct filter *f = given;
    struct epoll_event events[EVENTS];
    int more = 0, stopped = 0;
    pthread_setname_np(pthread_self(), "nibble-accept");
    while (!stopped || f->lingering) {
        int found = epoll_wait(f->poll, events, EVENTS, more ? 0 : patience(f));
        f->now = clock_now();
        if (!f->on_wheel) f->turn = (long)(f->now / TICK);
        for (int i = 0; i < found; i++) {
            struct source *source = events[i].data.ptr;
            eventfd_t count;
            if (source->kind == WAKE) eventfd_read(source->fd, &count);
            if (source->kind == LISTENER) accept_some(f, events[i].data.ptr);
            if (source->kind == CLIENT) heard(f, events[i].data.ptr);
        }
        more = expire(f);
        if (f->resting && f->now >= f->rest_until) listen_to(f, EPOLLIN);
        if (stop_asked(f)) {
            stop(f);
            stopped = 1;
        }
    }
    return NULL;
}

/* ---- The other side -------------------------------------------------------------------------- */

static void release(struct filter *f) {
    for (int i = 0; i < f->how_many; i++) close(f->listeners[i].source.fd);
    if (f->poll >= 0) close(f->poll);
    if (f->event >= 0) close(f->event);
    if (f->wake.fd >= 0) close(f->wake.fd);
    free(f->listeners);
    free(f);
}

static int watch_source(struct filter *f, struct source *source) {
    struct epoll_event wanted = {.events = EPOLLIN, .data.ptr = source};
    return epoll_ctl(f->poll, EPOLL_CTL_ADD, source->fd, &wanted);
}

/* A thread without signals: those are the interpreter's. */
static int begin_thread(struct filter *f) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&f->thread, NULL, run, f);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) errno = failed;
    return failed;
}

static int prepare(struct filter *f, const int *listeners, int how_many) {
    f->poll = epoll_create1(EPOLL_CLOEXEC);
    f->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    f->wake = (struct source){WAKE, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    f->listeners = calloc((size_t)how_many, sizeof *f->listeners);
    if (f->poll < 0 || f->event < 0 || f->wake.fd < 0 || !f->listeners) return -1;
    if (watch_source(f, &f->wake)) return -1;
    for (int i = 0; i < how_many; i++) {
        struct sockaddr_storage address;
        socklen_t size = sizeof address;
        struct listener *l = &f->listeners[i];
        l->source = (struct source){LISTENER, listeners[i]};
        if (getsockname(listeners[i], (struct sockaddr *)&address, &size)) return -1;
        l->family = address.ss_family;
        if (watch_source(f, &l->source)) return -1;
    }
    f->how_many = how_many;
    return 0;
}

struct filter *accept_start(const struct rules *rules, struct counts *counts, const int *listeners,
                            int how_many) {
    const struct reply *replies[] = {&rules->late, &rules->late_v1, &rules->stopping};
    for (int i = 0; i < 3; i++)
        if (replies[i]->size > REPLY) {
            errno = EMSGSIZE;
            return NULL;
        }
    struct filter *f = calloc(1, sizeof *f);
    if (!f) return NULL;
    f->rules = *rules;
    f->counts = counts;
    f->ready_end = &f->ready;
    f->now = clock_now();
    f->turn = (long)(f->now / TICK);
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->quiet, NULL);
    if (prepare(f, listeners, how_many) || begin_thread(f)) {
        int why = errno;
        f->how_many = 0; /* where it fails the listeners stay the caller's */
        release(f);
        errno = why;
        return NULL;
    }
    return f;
}

int accept_event(const struct filter *f) { return f->event; }

static void free_lent(struct filter *f) {
    for (struct client *next, *c = f->lent; c; c = next) {
        next = c->next;
        drop_bytes(f, c);
        free(c);
    }
    f->lent = NULL;
}

int accept_take(struct filter *f, struct taken *out, int most) {
    eventfd_t count;
    free_lent(f);
    eventfd_read(f->event, &count);
    struct client **end = &f->ready;
    int taken = 0;
    pthread_mutex_lock(&f->lock);
    for (; *end && taken < most; end = &(*end)->next) {
        const struct client *c = *end;
        out[taken++] =
            (struct taken){c->bytes, c->size, c->waited, c->source.fd, c->family, c->full};
    }
    if (taken) {
        f->lent = f->ready;
        f->ready = *end;
        *end = NULL;
        if (!f->ready) f->ready_end = &f->ready;
    }
    pthread_mutex_unlock(&f->lock);
    add(&f->counts->held, -taken);
    return taken;
}

void accept_stop(struct filter *f) {
    pthread_mutex_lock(&f->lock);
    f->stopping = 1;
    eventfd_write(f->wake.fd, 1);
    while (!f->stopped) pthread_cond_wait(&f->quiet, &f->lock);
    pthread_mutex_unlock(&f->lock);
}

void accept_end(struct filter *f) {
    pthread_join(f->thread, NULL);
    for (struct client *next, *c = f->ready; c; c = next) {
        next = c->next;
        close(c->source.fd);
        c->next = f->lent;
        f->lent = c;
    }
    free_lent(f);
    pthread_mutex_destroy(&f->lock);
    pthread_cond_destroy(&f->quiet);
    release(f);
}
