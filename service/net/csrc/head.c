#include "head.h"

#include <string.h>
#include <strings.h>

#define METHOD 20 /* letters of the longest */
#define DIGITS 15

static int is(const char *name, size_t size, const char *word) {
    return size == strlen(word) && strncasecmp(name, word, size) == 0;
}

static int request_line(const char *line, size_t size) {
    const char *target = memchr(line, ' ', size), *end = line + size;
    return target && end - target > 10 && target[1] == '/' &&
           (!memcmp(end - 9, " HTTP/1.1", 9) || !memcmp(end - 9, " HTTP/1.0", 9));
}

static void content_length(struct head *h, const char *value, const char *end) {
    while (value < end && (*value == ' ' || *value == '\t')) value++;
    while (value < end && (end[-1] == ' ' || end[-1] == '\t')) end--;
    h->plain = h->plain && h->length < 0 && value < end && end - value <= DIGITS;
    if (!h->plain) return;
    for (h->length = 0; value < end; value++) {
        if (*value < '0' || *value > '9') {
            h->plain = 0;
            return;
        }
        h->length = 10 * h->length + (*value - '0');
    }
}

/* One line, without its end; whether it looks like one. */
static int line(struct head *h, const char *text, size_t size) {
    if (h->lines++ == 0) return request_line(text, size);
    const char *colon = memchr(text, ':', size);
    if (!colon || colon == text) return 0;
    size_t name = (size_t)(colon - text);
    if (memchr(text, ' ', name) || memchr(text, '\t', name)) return 0;
    if (is(text, name, "content-length")) content_length(h, colon + 1, text + size);
    if (is(text, name, "transfer-encoding") || is(text, name, "expect")) h->plain = 0;
    return 1;
}

/* The letters of the method, up to the first space. */
static int method(struct head *h, char byte) {
    h->method = byte == ' ';
    return h->method ? h->seen > 0 : byte >= 'A' && byte <= 'Z' && h->seen < METHOD;
}

enum look head_look(struct head *h, const char *bytes, size_t size) {
    for (; h->seen < size; h->seen++) {
        unsigned char byte = (unsigned char)bytes[h->seen];
        if (byte == '\r') {
            if (h->seen + 1 == size) return HEAD_MORE;
            size_t width = h->seen - h->line;
            if (bytes[h->seen + 1] != '\n' || (!width && !h->lines)) return HEAD_ODD;
            if (width && !line(h, bytes + h->line, width)) return HEAD_ODD;
            h->line = ++h->seen + 1;
            if (width) continue;
            h->seen++;
            return HEAD_WHOLE;
        }
        if ((byte < ' ' && byte != '\t') || byte == 127) return HEAD_ODD;
        if (!h->method && !method(h, bytes[h->seen])) return HEAD_ODD;
    }
    return HEAD_MORE;
}
