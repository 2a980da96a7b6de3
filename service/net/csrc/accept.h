/* A thread that owns the listening sockets, reads what newcomers send, and hands a connection over
 * when its first request is there: accf_http(9) of FreeBSD, in user space. It decides when, never
 * what: the bytes go on as they came, and one parser reads them. Needs epoll, so Linux. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* A whole reply. At `id_at` 16 bytes become the refusal's id, at `date_at` 29 become the date. */
struct reply {
    const char *bytes;
    size_t size, id_at, date_at;
};

struct rules {
    double head_seconds;     /* for a whole head, from the moment that the connection was made */
    double grace_seconds;    /* for a body of b bytes: grace + b / rate, ... */
    double bytes_per_second; /* ... and no silence longer than `silence_seconds` */
    double silence_seconds;
    double linger_seconds;  /* for who was refused to read it */
    int64_t linger_bytes;   /* of such a client that are read, for no reset to overtake the reply */
    int64_t head_bytes;     /* a head without an end beyond them is handed over */
    int64_t body_bytes;     /* so is a longer body, with its head */
    int64_t all_bytes;      /* held of all together; whoever would need more is handed over */
    struct reply late;      /* to a body that came too slowly */
    struct reply late_v1;   /* the same, for paths that begin with "/v1/" */
    struct reply stopping;  /* to a body that is not here when the server stops */
    char id_prefix[10];     /* of the refusals' ids; six digits follow, which count up */
    int32_t max_open;       /* connections here and there; from then on nobody is held */
};

/* One memory for both sides, each number written by one of them. */
struct counts {
    int32_t held; /* by us: waiting, being refused, or not yet taken */
    int32_t open; /* by the event loop: it writes this one */
    int64_t bytes;
    int64_t late;    /* bodies that were refused; the id of the last one ends with it */
    int64_t closed;  /* heads that did not come */
    int64_t starved; /* times that no descriptor was left for another connection */
};

/* A connection for the event loop. `bytes` are valid until the next call of `accept_take`. */
struct taken {
    const char *bytes;
    size_t size;
    double waited; /* seconds that the head, or the body, that is not whole has been coming */
    int32_t fd, family;
    int32_t full; /* it came when `max_open` connections were here: nothing of it was read */
};

struct filter;

/* `listeners` belong to the filter from here on. NULL, with errno, where it cannot begin. */
EXPORT struct filter *accept_start(const struct rules *rules, struct counts *counts,
                                   const int *listeners, int how_many);
/* An eventfd that is readable while there is something to take. */
EXPORT int accept_event(const struct filter *f);
EXPORT int accept_take(struct filter *f, struct taken *out, int most);
/* Take no more connections; when it returns, whoever was whole can be taken, and others know. */
EXPORT void accept_stop(struct filter *f);
/* After `accept_stop`: wait for who still reads a refusal, and free everything. */
EXPORT void accept_end(struct filter *f);
