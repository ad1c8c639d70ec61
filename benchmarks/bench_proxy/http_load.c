/* Posts one body over and over and measures what comes back, to the microsecond: what wrk does not tell of streams.
 *
 *     http_load PORT NUM_CONNECTIONS RAMP_MS WINDOW_MS BODY_FILE
 *
 * The connections open evenly over the ramp, and each posts again as soon as it is answered. Then the window: "begin" and
 * "end" are printed around it, so that whoever reads can note the proxy's CPU time. Then what is under way may finish
 * (for PATIENCE_S), and a line of JSON is printed. Latencies are those of requests that lie within the window; spacings
 * are the times between the events of a stream that arrived within it (0 between two that arrived together).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_BYTES = 8192, READ_BYTES = 1 << 18, MAX_US = 4000000, PATIENCE_S = 10 };
enum state { IDLE, HEAD, COUNTED, SIZE, DATA, DATA_END, TRAILER }; /* of reading an answer */

struct connection {
    int fd, status;
    enum state state;
    size_t left;              /* bytes of the body, or of this chunk of it; in TRAILER: bytes of this line */
    int64_t started_us, first_us, last_event_us;
    bool after_newline;       /* the body so far ends with \n: one more ends an event */
    size_t head_length;
    char head[HEAD_BYTES];
};

struct histogram {
    uint32_t counts[MAX_US + 1];
    long num;
};

static struct histogram latencies, firsts, spacings;
static long num_done, num_failed, num_events, num_open;
static int64_t begin_us, end_us, now;
static char request[1 << 20], input[READ_BYTES];
static size_t request_length;
static struct sockaddr_in address;
static int epoll_fd;

static int64_t now_us(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000LL + time.tv_nsec / 1000;
}

static void note(struct histogram *h, int64_t us) {
    h->counts[us < MAX_US ? us : MAX_US]++, h->num++;
}

static long percentile(const struct histogram *h, double share) {
    long rank = share * (h->num - 1), us = 0;
    for (long seen = h->counts[0]; seen <= rank && us < MAX_US; seen += h->counts[++us]) {}
    return us;
}

static void post(struct connection *c) {
    c->state = HEAD, c->head_length = 0, c->first_us = c->last_event_us = 0, c->after_newline = false;
    c->started_us = now_us();
    num_open++;
    if (send(c->fd, request, request_length, MSG_NOSIGNAL) != (ssize_t)request_length) shutdown(c->fd, SHUT_RDWR);
}

static void connect_one(struct connection *c) {
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct epoll_event wanted = {.events = EPOLLIN, .data.ptr = c};
    if (connect(c->fd, (void *)&address, sizeof address)) {
        num_failed++;
        close(c->fd);
        return;
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &wanted);
    post(c);
}

static void answered(struct connection *c) {
    c->state = IDLE, num_open--;
    if (c->status != 200) num_failed++;
    else if (c->started_us >= begin_us && now <= end_us) {
        num_done++;
        note(&latencies, now - c->started_us), note(&firsts, c->first_us - c->started_us);
    }
    if (now < end_us) post(c);
}

static void broken(struct connection *c) {
    if (c->state != IDLE) num_failed++, num_open--;
    close(c->fd);
    if (now < end_us) connect_one(c);
}

/* Count the events in a piece of a body, by the empty lines that end them. */
static void count_events(struct connection *c, const char *data, size_t length) {
    if (!c->first_us) c->first_us = now;
    for (const char *at = data, *end = data + length; at < end; at++) {
        if (!c->after_newline) {
            at = memchr(at, '\n', end - at);
            if (!at) return;
            c->after_newline = true;
        } else {
            c->after_newline = false;
            if (*at != '\n') continue;
            if (now >= begin_us && now <= end_us) {
                num_events++;
                if (c->last_event_us) note(&spacings, now - c->last_event_us);
            }
            c->last_event_us = now;
        }
    }
}

/* The head, once it is whole; returns how much of `data` belongs to it. */
static size_t read_head(struct connection *c, const char *data, size_t length) {
    size_t before = c->head_length, room = HEAD_BYTES - 1 - before;
    size_t taken = length < room ? length : room;
    memcpy(c->head + before, data, taken);
    c->head[c->head_length += taken] = 0;
    char *end = strstr(c->head, "\r\n\r\n"), *field;
    if (!end) return taken;
    end[2] = 0;
    c->status = atoi(c->head + 9);
    if ((field = strcasestr(c->head, "\ncontent-length:"))) c->state = COUNTED, c->left = strtoul(field + 16, NULL, 10);
    else if (strcasestr(c->head, "\ntransfer-encoding: chunked")) c->state = SIZE, c->left = 0;
    else c->status = 0, c->state = COUNTED, c->left = 0;
    return end + 4 - c->head - before;
}

/* One step of the body's framing; returns how much of `data` it took. */
static size_t read_body(struct connection *c, const char *data, size_t length) {
    if (c->state == COUNTED || c->state == DATA) {
        size_t taken = length < c->left ? length : c->left;
        count_events(c, data, taken);
        if (!(c->left -= taken) && c->state == DATA) c->state = DATA_END;
        return taken;
    }
    char byte = *data;
    if (c->state == SIZE && byte == '\n') c->state = c->left ? DATA : TRAILER;
    else if (c->state == SIZE && byte != '\r') c->left = 16 * c->left + (byte <= '9' ? byte - '0' : (byte | 32) - 'a' + 10);
    else if (c->state == DATA_END && byte == '\n') c->state = SIZE, c->left = 0;
    else if (c->state == TRAILER && byte == '\n' && !c->left) answered(c);
    else if (c->state == TRAILER && byte != '\r') c->left = byte == '\n' ? 0 : c->left + 1;
    return 1;
}

static void readable(struct connection *c) {
    ssize_t length = recv(c->fd, input, READ_BYTES, MSG_DONTWAIT);
    if (length < 0 && errno == EAGAIN) return;
    if (length <= 0) return broken(c);
    for (const char *at = input, *end = input + length; at < end;) {
        if (c->state == IDLE) return; /* bytes that nobody asked for */
        at += c->state == HEAD ? read_head(c, at, end - at) : read_body(c, at, end - at);
        if (c->state == HEAD && c->head_length == HEAD_BYTES - 1) return broken(c);
        if (c->state == COUNTED && !c->left) answered(c);
    }
}

static void print_histogram(const char *name, const struct histogram *h) {
    printf(", \"%s\": ", name);
    if (h->num) printf("{\"p50\": %ld, \"p99\": %ld}", percentile(h, 0.5), percentile(h, 0.99));
    else printf("null");
}

static void say(const char *what) {
    puts(what);
    fflush(stdout);
}

int main(int argc, char **argv) {
    if (argc != 6) return fputs("http_load PORT NUM_CONNECTIONS RAMP_MS WINDOW_MS BODY_FILE\n", stderr), 2;
    static char body[1 << 19];
    FILE *file = fopen(argv[5], "r");
    if (!file) return perror(argv[5]), 2;
    size_t length = fread(body, 1, sizeof body - 1, file);
    request_length = sprintf(request, "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                             "Content-Length: %zu\r\n\r\n%s", length, body);
    address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                   .sin_port = htons(atoi(argv[1]))};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int num_connections = atoi(argv[2]), num_connected = 0;
    struct connection *connections = calloc(num_connections, sizeof *connections);
    int64_t started_us = now_us(), ramp_us = atol(argv[3]) * 1000;
    begin_us = started_us + ramp_us, end_us = begin_us + atol(argv[4]) * 1000;
    bool has_begun = false, has_ended = false;
    for (;;) {
        now = now_us();
        while (num_connected < num_connections && now >= started_us + ramp_us * num_connected / num_connections)
            connect_one(&connections[num_connected++]);
        if (!has_begun && now >= begin_us) has_begun = true, say("begin");
        if (!has_ended && now >= end_us) has_ended = true, say("end");
        if (has_ended && (!num_open || now > end_us + PATIENCE_S * 1000000LL)) break;
        struct epoll_event events[512];
        int num = epoll_wait(epoll_fd, events, 512, 1);
        now = now_us(); /* the same for all that arrived together */
        for (int i = 0; i < num; i++) readable(events[i].data.ptr);
    }
    printf("{\"num_requests\": %ld, \"num_failed\": %ld, \"num_unfinished\": %ld, \"num_events\": %ld", num_done, num_failed,
           num_open, num_events);
    print_histogram("latency_us", &latencies), print_histogram("first_us", &firsts), print_histogram("spacing_us", &spacings);
    say("}");
    return 0;
}
