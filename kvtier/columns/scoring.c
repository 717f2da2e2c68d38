/* What pages are worth: `kvtier.policy.spells` `_worth` and `_score_all`. */
#include "spells.h"

#include <string.h>

/* A double without these bits is its power of two and the first bit after that; the first age ends at 2^-4 seconds. */
enum { BITS = 51, BELOW = (1023 - 4) * 2 - 1 };
enum { AHEAD = 8 }; /* queued pages are fetched so many before their turn */

int age_bin(double age) {
    int64_t bits;
    memcpy(&bits, &age, sizeof bits);
    const int64_t bin = (bits >> BITS) - BELOW;
    return bin < 0 ? 0 : bin >= AGES ? AGES - 1 : (int)bin;
}

/* The worth of a page at its age, between two ages in proportion. */
static double worth(const Spells *s, int64_t page, double now) {
    const double age = now - s->ranking->seats[page].last;
    const int bin = age_bin(age), next = bin + 1 < AGES ? bin + 1 : AGES - 1;
    const double *of_kind = s->worth + facts_of(s, page)[KIND] * AGES;
    const double share = bin ? (age - s->edges[bin]) / (s->edges[bin + 1] - s->edges[bin]) : 0.0;
    return of_kind[bin] + (of_kind[next] - of_kind[bin]) * share;
}

void score_at(Spells *s, int64_t page, double time) {
    int64_t *facts = facts_of(s, page);
    facts[SCORED] = s->counts[SCORING];
    if ((uint64_t)facts[KIND] >= (uint64_t)s->kinds) return;
    /* At equal scores what was used longest ago leaves: the order of LRU. */
    s->ranking->seats[page].score = s->guard[FOLLOWS] ? 0.0 : worth(s, page, time);
}

void spells_refresh(void *spells, int64_t page) {
    Spells *s = spells;
    if (facts_of(s, page)[SCORED] != s->counts[SCORING]) score_at(s, page, s->clock[SCORED_AT]);
}

/* What will be looked at of a page that is scored soon. */
static void fetch(const Spells *s, Py_ssize_t page) {
    __builtin_prefetch(&s->ranking->seats[page], 1);
    __builtin_prefetch(facts_of(s, page), 1);
}

static void score_queued(Spells *s) {
    Ranking *r = s->ranking;
    const Py_ssize_t queued = ranking_cell(r, r->numbers[QUEUED]);
    for (Py_ssize_t place = 0; place < queued; place++) {
        fetch(s, ranking_cell(r, r->heap[place + AHEAD < queued ? place + AHEAD : place]));
        score_at(s, ranking_cell(r, r->heap[place]), s->clock[SCORED_AT]);
    }
    ranking_reorder(r);
}

void score_if_due(Spells *s, double time) {
    const int64_t share = s->steps[RESCORED_SHARE], present = ranking_cell(s->ranking, s->ranking->numbers[PRESENT]);
    if (s->counts[GONE] < present / share + (present % share != 0)) return;
    s->counts[GONE] = 0;
    s->counts[SCORING]++;
    s->clock[SCORED_AT] = time;
    score_queued(s);
}

PyObject *score_all(PyObject *self, PyObject *ignored) {
    (void)ignored;
    score_queued((Spells *)self);
    Py_RETURN_NONE;
}
