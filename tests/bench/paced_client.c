/* Ask so many questions a second, evenly, and say how long the answers took: from just before a question is sent to when
 * the kernel had its answer (SO_TIMESTAMPNS), so that the asker's own waking up is no part of it. An asker that is late
 * goes on from there: what it missed is not sent in a heap.
 *
 *     paced_client PORT QUESTIONS_A_SECOND SECONDS FILE      FILE has lines `name A`
 *     sent N answered N p50 NS p99 NS p999 NS max NS
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>

enum { SOCKETS = 4, NAMES = 100000, QUERY = 320, LATE_NS = 200000, DRAIN_NS = 1000000000 };

static unsigned char query[NAMES][QUERY];
static size_t size[NAMES];
static uint64_t sent_at[SOCKETS][65536];
static uint64_t *took;
static size_t answered;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static size_t pack(unsigned char *out, const char *name) {
    static const unsigned char head[12] = {0, 0, 1, 0, 0, 1};
    size_t at = 12;
    memcpy(out, head, 12);
    for (const char *label = name; *label;) {
        size_t length = strcspn(label, ".");
        out[at++] = length;
        memcpy(out + at, label, length);
        at += length;
        label += length + (label[length] == '.');
    }
    memcpy(out + at, "\0\0\1\0\1", 5);
    return at + 5;
}

static int read_names(const char *path) {
    FILE *file = fopen(path, "r");
    char name[256];
    int count = 0;
    if (!file) { perror(path); exit(1); }
    while (count < NAMES && fscanf(file, "%255s %*s", name) == 1) {
        size[count] = pack(query[count], name);
        count++;
    }
    fclose(file);
    return count;
}

static int open_socket(int port) {
    int s = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0), on = 1, bytes = 4 * 1024 * 1024;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(s, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
    if (setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes) != 0)
        setsockopt(s, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
    if (connect(s, (struct sockaddr *)&to, sizeof to) != 0) { perror("connect"); exit(1); }
    return s;
}

static void receive(int s, uint64_t *sent) {
    unsigned char data[4096], control[128];
    struct iovec vector = {data, sizeof data};
    for (;;) {
        struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        if (recvmsg(s, &message, 0) < 12) return;
        uint64_t came = 0, *asked = &sent[data[0] << 8 | data[1]];
        for (struct cmsghdr *each = CMSG_FIRSTHDR(&message); each; each = CMSG_NXTHDR(&message, each))
            if (each->cmsg_type == SCM_TIMESTAMPNS) {
                struct timespec t;
                memcpy(&t, CMSG_DATA(each), sizeof t);
                came = t.tv_sec * 1000000000ull + t.tv_nsec;
            }
        if (*asked && came) took[answered++] = came > *asked ? came - *asked : 0;
        *asked = 0;
    }
}

static int by_size(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    if (argc != 5) { fprintf(stderr, "usage: %s PORT QUESTIONS_A_SECOND SECONDS FILE\n", argv[0]); return 2; }
    uint64_t each = 1000000000ull / atoi(argv[2]), sent = 0, names = read_names(argv[4]);
    struct pollfd polled[SOCKETS];
    for (int i = 0; i < SOCKETS; i++) polled[i] = (struct pollfd){.fd = open_socket(atoi(argv[1])), .events = POLLIN};
    took = malloc(sizeof *took * (atoi(argv[2]) + 1ull) * (atoi(argv[3]) + 1ull));
    if (!took || !names) return 1;
    prctl(PR_SET_TIMERSLACK, 1);
    uint64_t due = now(), end = due + atoi(argv[3]) * 1000000000ull;
    while (now() < end + DRAIN_NS) {
        uint64_t at = now();
        if (at > due + LATE_NS) due = at;
        while (at < end && due <= at) {
            int i = sent % SOCKETS;
            unsigned id = sent / SOCKETS & 0xffff;
            unsigned char *data = query[sent % names];
            data[0] = id >> 8;
            data[1] = id;
            sent_at[i][id] = now();
            send(polled[i].fd, data, size[sent % names], 0);
            sent++;
            due += each;
        }
        for (int i = 0; i < SOCKETS; i++) receive(polled[i].fd, sent_at[i]);
        at = now();
        struct timespec wait = {0, at >= end ? 1000000 : due > at ? due - at : 0};
        ppoll(polled, SOCKETS, &wait, NULL);
    }
    if (!answered) return 1;
    qsort(took, answered, sizeof *took, by_size);
    printf("sent %lu answered %lu p50 %lu p99 %lu p999 %lu max %lu\n", (unsigned long)sent, (unsigned long)answered,
           (unsigned long)took[answered / 2], (unsigned long)took[answered * 99 / 100],
           (unsigned long)took[answered * 999 / 1000], (unsigned long)took[answered - 1]);
    return 0;
}
