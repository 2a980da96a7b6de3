/* The head of a request, looked at as it comes: where it ends, and whether it says plainly how long
 * the body is. Nothing else is understood here, and nothing is refused. */
#pragma once
#include <stddef.h>
#include <stdint.h>

struct head {
    size_t seen, line; /* the next byte to look at; where its line began */
    int lines, method; /* lines that ended; whether the method has */
    int plain;         /* so far nothing but at most one Content-Length tells how the body comes */
    int64_t length;    /* what it said; -1: no line did */
};

enum look {
    HEAD_MORE,  /* the empty line has not come */
    HEAD_WHOLE, /* it has: `seen` is where the body begins */
    HEAD_ODD,   /* no request begins like that: the parser refuses it, and a wait is for nothing */
};

/* Look at those of `size` bytes that are new. */
enum look head_look(struct head *h, const char *bytes, size_t size);
