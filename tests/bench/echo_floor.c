/* The floor of a DNS server: answer every UDP packet with itself, the QR bit set. No parsing, no table; buffers as
 * large as dnsd's, so that neither loses what the other would keep waiting. */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

int main(int argc, char **argv) {
    if (argc != 2) { fprintf(stderr, "usage: %s PORT\n", argv[0]); return 2; }
    int s = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(s, (struct sockaddr *)&at, sizeof at) != 0) { perror("bind"); return 1; }
    int bytes = 4 * 1024 * 1024;
    if (setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes) != 0)
        setsockopt(s, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
    unsigned char packet[4096];
    for (;;) {
        struct sockaddr_in from;
        socklen_t size = sizeof from;
        ssize_t n = recvfrom(s, packet, sizeof packet, 0, (struct sockaddr *)&from, &size);
        if (n < 12) continue;
        packet[2] |= 0x80;
        sendto(s, packet, n, 0, (struct sockaddr *)&from, size);
    }
}
