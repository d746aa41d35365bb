/* Answers cpuid for code in which it was replaced by ud2: what the processor says, less all that came
 * after AVX2. */
#define _GNU_SOURCE /* names of registers */
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

static struct sigaction before;
static volatile long answers;

long held_answers(void) { return answers; }

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    static const uint8_t UD2[] = {0x0f, 0x0b};
    if (memcmp((const void *)registers[REG_RIP], UD2, sizeof UD2)) {
        if (before.sa_flags & SA_SIGINFO) before.sa_sigaction(number, info, context);
        else signal(number, SIG_DFL); /* the instruction is run again */
        return;
    }
    uint32_t leaf = (uint32_t)registers[REG_RAX], subleaf = (uint32_t)registers[REG_RCX];
    uint32_t a, b, c, d;
    __cpuid_count(leaf, subleaf, a, b, c, d);
    if (leaf == 7 && subleaf == 0) {
        b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 28 | 1u << 30 | 1u << 31); /* AVX-512 */
        c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);             /* its VNNI and others */
        d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25); /* AMX */
    }
    if (leaf == 7 && subleaf == 1) a &= ~(1u << 4 | 1u << 5), d = 0; /* AVX-VNNI, bfloat16 */
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
    registers[REG_RIP] += sizeof UD2;
    answers++;
}

__attribute__((constructor)) static void hold(void) {
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO};
    sigaction(SIGILL, &action, &before);
}
