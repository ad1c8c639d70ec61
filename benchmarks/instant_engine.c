/* A stand-in for one vLLM api server that answers at once, so that a proxy before it is what is measured.
 *
 *     instant_engine [PORT]        prints its port (0 or none given: any free one), then serves until its parent dies
 *
 * POST /v1/completions   "do_remote_decode":true makes it a prefill, answered whole with NIXL's kv_transfer_params.
 *                        "stream":true streams max_tokens chunks, one write each: at once (one per turn of the event
 *                        loop, as tokens come) or, for "model":"paced", one every PACE_MS.
 *                        Anything else is answered whole, with max_tokens words.
 *                        return_token_ids and include_usage add what vLLM adds.
 * GET                    /health, /v1/models, /version, and /metrics with the number of prefills, decodes and chunks.
 *
 * Heads, JSON and framing are those of vLLM 0.32 under uvicorn.
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
#include <sys/timerfd.h>
#include <unistd.h>

enum {
    IN_BYTES = 1 << 17,
    OUT_BYTES = 1 << 17,
    NUM_SLOTS = 20,  /* paced streams are spread over the 20 ms in as many groups, as if several engines made them */
    PACE_MS = 20,
    MAX_CHUNKS = 8192,
    NUM_PROMPT_TOKENS = 200,
    MAX_CONNECTIONS = 16384,
};

enum { FIRST, NEXT, LAST };

struct list; /* of connections that stream: those at once, or one slot of the paced ones */

struct connection {
    int fd;
    size_t in_length;
    const char *out; /* what of the current piece is not yet written */
    size_t out_length;
    bool has_ids, has_usage;
    int num_chunks, next_piece, num_due; /* of a stream; pieces: the chunks, then usage and [DONE] */
    struct list *list;
    int index; /* in that list */
    char in[IN_BYTES], own[OUT_BYTES];
};

struct list {
    struct connection *items[MAX_CONNECTIONS];
    int length;
};

static struct list at_once, slots[NUM_SLOTS];
static int epoll_fd, timer_fd, slot_now, num_paced;
static long num_prefills, num_decodes, num_chunks_sent;
static char prompt_ids[NUM_PROMPT_TOKENS * 6]; /* [1000,1001,...] */
static char chunks[3][2][4096]; /* first, next or last; with token ids or without */

#define ID "\"id\":\"cmpl-8b6f2f0d4c5e4f1a9d3c7e6b5a493827\",\"object\":\"text_completion\",\"created\":1763740000," \
           "\"model\":\"instant\","
#define USAGE "{\"prompt_tokens\":%d,\"total_tokens\":%d,\"completion_tokens\":%d"
#define DATE "date: Sat, 21 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n"

static const char STREAM_HEAD[] = "HTTP/1.1 200 OK\r\n" DATE
    "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
static const char STREAM_END[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";

static const char NIXL_PARAMS[] =
    "{\"do_remote_prefill\":true,\"do_remote_decode\":false,\"remote_block_ids\":[[1,2,3,4,5,6,7,8,9,10,11,12,13]],"
    "\"remote_engine_id\":\"6f1f3a52-2c39-4f0e-9a55-0d7d3a1f4c11\","
    "\"remote_request_id\":\"cmpl-8b6f2f0d4c5e4f1a9d3c7e6b5a493827-0-a1b2c3d4\",\"remote_host\":\"127.0.0.1\","
    "\"remote_port\":5600,\"tp_size\":1,\"dcp_size\":1,\"pp_size\":1,\"remote_num_tokens\":200,"
    "\"remote_blocks_expiry_time\":1763740030.0,\"transfer_mode\":\"pull\",\"remote_prefill_cached_tokens\":0}";

/* One event in chunked framing, as uvicorn writes it. */
static void frame_event(char *to, const char *json) {
    sprintf(to, "%zx\r\ndata: %s\n\n\r\n", strlen(json) + 8, json);
}

static void make_pieces(void) {
    char json[4096], *end = prompt_ids;
    for (int i = 0; i < NUM_PROMPT_TOKENS; i++) end += sprintf(end, "%c%d", i ? ',' : '[', 1000 + i);
    *end = ']';
    static const char FORMAT[] = "{" ID "\"choices\":[{\"index\":0,\"text\":\" word\",\"logprobs\":null,"
        "\"finish_reason\":%s,\"stop_reason\":null,\"prompt_token_ids\":%s,\"token_ids\":%s}]}";
    for (int place = FIRST; place <= LAST; place++)
        for (int has_ids = 0; has_ids < 2; has_ids++) {
            sprintf(json, FORMAT, place == LAST ? "\"length\"" : "null", place == FIRST && has_ids ? prompt_ids : "null",
                    has_ids ? "[1234]" : "null");
            frame_event(chunks[place][has_ids], json);
        }
}

static void list_add(struct list *list, struct connection *c) {
    c->list = list, c->index = list->length;
    list->items[list->length++] = c;
}

/* The timer runs only while something is paced: an idle engine sleeps. */
static void pace(int change) {
    int64_t ns = (num_paced += change) ? PACE_MS * 1000000L / NUM_SLOTS : 0;
    struct itimerspec period = {{0, ns}, {0, ns}};
    if (num_paced == 0 || (num_paced == 1 && change == 1)) timerfd_settime(timer_fd, 0, &period, NULL);
}

static void leave_list(struct connection *c) {
    if (!c->list) return;
    struct connection *last = c->list->items[--c->list->length];
    c->list->items[last->index = c->index] = last;
    if (c->list != &at_once) pace(-1);
    c->list = NULL;
}

static void close_connection(struct connection *c) {
    leave_list(c);
    close(c->fd);
    free(c);
}

static void set_out(struct connection *c, const char *data, size_t length) { c->out = data, c->out_length = length; }

/* The next piece of a stream. False: it was the last one. */
static bool next_piece(struct connection *c) {
    int i = c->next_piece++;
    const char *piece = STREAM_END;
    if (i < c->num_chunks) {
        num_chunks_sent++;
        piece = chunks[i == c->num_chunks - 1 ? LAST : i ? NEXT : FIRST][c->has_ids];
    } else if (i == c->num_chunks && c->has_usage) {
        char json[1024];
        sprintf(json, "{" ID "\"choices\":[],\"usage\":" USAGE "}}", NUM_PROMPT_TOKENS,
                NUM_PROMPT_TOKENS + c->num_chunks, c->num_chunks);
        frame_event(c->own, json);
        piece = c->own;
    }
    set_out(c, piece, strlen(piece));
    return piece != STREAM_END;
}

/* Write what is due. False: the connection is gone. */
static bool flush(struct connection *c) {
    for (;;) {
        while (c->out_length) {
            ssize_t n = send(c->fd, c->out, c->out_length, MSG_NOSIGNAL);
            if (n < 0 && errno == EAGAIN) return true; /* EPOLLOUT comes */
            if (n < 0) return close_connection(c), false;
            c->out += n, c->out_length -= n;
        }
        if (!c->list || !c->num_due) return true;
        c->num_due--;
        bool goes_on = next_piece(c);
        if (c->next_piece >= c->num_chunks && goes_on) c->num_due++; /* usage and [DONE] follow the last chunk at once */
        if (!goes_on) leave_list(c);
    }
}

static bool answer(struct connection *c, const char *status, const char *type, const char *body) {
    int n = snprintf(c->own, OUT_BYTES, "HTTP/1.1 %s\r\n" DATE "content-length: %zu\r\ncontent-type: %s\r\n\r\n%s", status,
                     strlen(body), type, body);
    set_out(c, c->own, n);
    return flush(c);
}

static bool complete_whole(struct connection *c, int num_tokens, const char *params) {
    static char text[MAX_CHUNKS * 5 + 1], ids[MAX_CHUNKS * 5 + 2], body[OUT_BYTES - 512];
    *ids = 0;
    for (int i = 0; i < num_tokens; i++) memcpy(text + 5 * i, " word", 5), memcpy(ids + 5 * i, i ? ",1234" : "[1234", 5);
    text[5 * num_tokens] = 0, strcpy(ids + 5 * num_tokens, "]");
    snprintf(body, sizeof body, "{" ID "\"choices\":[{\"index\":0,\"text\":\"%s\",\"logprobs\":null,\"finish_reason\":\"length\","
        "\"stop_reason\":null,\"token_ids\":%s,\"prompt_logprobs\":null,\"prompt_token_ids\":%s,\"routed_experts\":null}],"
        "\"service_tier\":null,\"system_fingerprint\":null,\"usage\":" USAGE ",\"prompt_tokens_details\":null,"
        "\"completion_tokens_details\":null},\"kv_transfer_params\":%s,\"ec_transfer_params\":null,\"metrics\":null}",
        text, c->has_ids ? ids : "null", c->has_ids ? prompt_ids : "null", NUM_PROMPT_TOKENS,
        NUM_PROMPT_TOKENS + num_tokens, num_tokens, params);
    return answer(c, "200 OK", "application/json", body);
}

static long number_after(const char *body, const char *key, long otherwise) {
    const char *at = strstr(body, key);
    return at ? strtol(at + strlen(key), NULL, 10) : otherwise;
}

static bool complete(struct connection *c, const char *body) {
    long num_tokens = number_after(body, "\"max_tokens\":", 16);
    num_tokens = num_tokens < 1 ? 1 : num_tokens > MAX_CHUNKS ? MAX_CHUNKS : num_tokens;
    c->has_ids = strstr(body, "\"return_token_ids\":true");
    c->has_usage = strstr(body, "\"include_usage\":true");
    if (strstr(body, "\"do_remote_decode\":true")) return num_prefills++, complete_whole(c, num_tokens, NIXL_PARAMS);
    num_decodes++;
    if (!strstr(body, "\"stream\":true")) return complete_whole(c, num_tokens, "null");
    c->num_chunks = num_tokens, c->next_piece = 0, c->num_due = 0;
    bool is_paced = strstr(body, "\"model\":\"paced\"");
    list_add(is_paced ? &slots[(slot_now + 1) % NUM_SLOTS] : &at_once, c);
    if (is_paced) pace(1);
    set_out(c, STREAM_HEAD, sizeof STREAM_HEAD - 1);
    return flush(c);
}

static bool serve(struct connection *c, const char *body) {
    static const char JSON[] = "application/json", TEXT[] = "text/plain; charset=utf-8";
    char counts[512];
    snprintf(counts, sizeof counts, "instant_engine_prefills_total %ld\ninstant_engine_decodes_total %ld\n"
             "instant_engine_chunks_total %ld\n", num_prefills, num_decodes, num_chunks_sent);
    if (!strncmp(c->in, "POST /v1/completions ", 21)) return complete(c, body);
    if (!strncmp(c->in, "GET /health ", 12)) return answer(c, "200 OK", TEXT, "");
    if (!strncmp(c->in, "GET /metrics ", 13)) return answer(c, "200 OK", TEXT, counts);
    if (!strncmp(c->in, "GET /version ", 13)) return answer(c, "200 OK", JSON, "{\"version\":\"0.32.0\"}");
    if (!strncmp(c->in, "GET /v1/models ", 15))
        return answer(c, "200 OK", JSON, "{\"object\":\"list\",\"data\":[{\"id\":\"instant\",\"object\":\"model\","
                      "\"created\":1763740000,\"owned_by\":\"vllm\",\"max_model_len\":8192},{\"id\":\"paced\","
                      "\"object\":\"model\",\"created\":1763740000,\"owned_by\":\"vllm\",\"max_model_len\":8192}]}");
    return answer(c, "404 Not Found", JSON, "{\"detail\":\"Not Found\"}");
}

/* Serve what requests are complete. The next one waits until this one is answered. */
static void read_requests(struct connection *c) {
    for (;;) {
        ssize_t n = recv(c->fd, c->in + c->in_length, IN_BYTES - 1 - c->in_length, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN)) return close_connection(c);
        if (n > 0) c->in[c->in_length += n] = 0;
        if (!c->in_length || c->out_length || c->list) return;
        char *body = strstr(c->in, "\r\n\r\n");
        const char *field = strcasestr(c->in, "\ncontent-length:");
        size_t length = body && field && field < body ? strtoul(field + 16, NULL, 10) : 0;
        size_t whole = body ? body + 4 - c->in + length : 0;
        if (whole >= IN_BYTES) return close_connection(c);
        if (body && c->in_length >= whole) {
            if (!serve(c, body + 4)) return;
            memmove(c->in, c->in + whole, c->in_length -= whole);
            c->in[c->in_length] = 0;
        } else if (n <= 0) return;
    }
}

static void accept_connections(int listener) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct connection *c = calloc(1, sizeof *c);
        struct epoll_event wanted = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};
        c->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &wanted);
    }
}

/* Backwards, for a stream that ends makes way to the last one. */
static void one_more_chunk(struct list *list) {
    for (int i = list->length - 1; i >= 0; i--) {
        struct connection *c = list->items[i];
        if (list != &at_once || !c->num_due) c->num_due++;
        flush(c);
    }
}

static void tick(void) {
    uint64_t num_ticks = 0;
    if (read(timer_fd, &num_ticks, sizeof num_ticks) < 0) return;
    while (num_ticks--) one_more_chunk(&slots[slot_now = (slot_now + 1) % NUM_SLOTS]);
}

int main(int argc, char **argv) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port = htons(argc > 1 ? atoi(argv[1]) : 0)};
    socklen_t size = sizeof address;
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (void *)&address, size) || listen(listener, 4096)) return perror("instant_engine"), 1;
    getsockname(listener, (void *)&address, &size);
    make_pieces();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event events[512] = {{.events = EPOLLIN, .data.ptr = &listener}, {.events = EPOLLIN, .data.ptr = &timer_fd}};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &events[0]);
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &events[1]);
    printf("%d\n", ntohs(address.sin_port)), fflush(stdout);
    for (;;) {
        int n = epoll_wait(epoll_fd, events, 512, at_once.length ? 0 : -1);
        bool is_due = false;
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr == &listener) accept_connections(listener);
            else if (events[i].data.ptr == &timer_fd) is_due = true;
            else if (flush(events[i].data.ptr)) read_requests(events[i].data.ptr);
        }
        if (is_due) tick(); /* after them: what breaks in it is freed, and may have an event among these */
        one_more_chunk(&at_once);
    }
}
