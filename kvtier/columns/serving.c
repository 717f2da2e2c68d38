/* What requests do to pages: `touch` and `insert`. Every call looks at all its pages first, changes
   nothing where one is unusual, and then goes through them once. */
#include "spells.h"

#include <string.h>

/* -- kinds -- */

/* -1 for features that make no known kind. */
static int64_t kind_of(const Spells *s, int64_t combined) {
    const int64_t kind = (uint64_t)combined < (uint64_t)s->numbers ? s->kind_of[combined] : -1;
    return kind < s->kinds ? kind : -1;
}

/* Whether features are those of a kind, known or noted as missing. */
static bool know(const Spells *s, int64_t combined) {
    if ((uint64_t)combined >= (uint64_t)s->numbers) return false;
    if (kind_of(s, combined) >= 0) return true;
    const int64_t count = s->missing[0];
    for (int64_t i = 1; i <= count; i++) {
        if (s->missing[i] == combined) return true;
    }
    if (count >= s->most_missing) return false;
    s->missing[++s->missing[0]] = combined;
    return true;
}

/* What looking at all pages comes to, once `missing` was emptied before. */
static long verdict(const Spells *s, bool usual) { return !usual ? UNUSUAL : s->missing[0] ? UNKNOWN_KINDS : 0; }

static bool is_sound(const Spells *s, const int64_t *facts) {
    return (uint64_t)facts[KIND] < (uint64_t)s->kinds && facts[COHORT] >= 0 && (uint64_t)facts[GENERATION] < (uint64_t)s->generations &&
           facts[USES] >= 0 && facts[COMBINED] >= 0;
}

static bool is_sound_ghost(const Spells *s, const Ghost *ghost) {
    return kind_of_ghost(ghost) < s->kinds && cohort_of_ghost(ghost) >= 0 && generation_of_ghost(ghost) < s->generations;
}

static int64_t features(const Spells *s, int64_t uses, int64_t generation) {
    return s->count_of[uses < s->uses_told_apart ? uses : s->uses_told_apart - 1] + s->generation_of[generation];
}

/* The features of a page once it is used again. */
static int64_t features_if_used(const Spells *s, int64_t page) {
    const int64_t *facts = facts_of(s, page);
    return features(s, facts[USES] + 1, facts[GENERATION]) + facts[COMBINED] % s->steps[ATTENTION];
}

/* -- spells -- */

/* The spell of a page or ghost of this kind, begun in this cohort, ends with a use at this age (`age_bin`). */
static void end_spell(Spells *s, int64_t kind, int64_t cohort, int age) {
    if (cohort <= s->period[NOW] - s->cohorts) return;
    const Py_ssize_t row = cohort & (s->cohorts - 1);
    const int64_t start = s->counted[row];
    s->alive[row * s->kinds + kind]--;
    s->hits[kind * AGES + age]++;
    if (start < 0 || start > age) return;
    s->change[kind * (AGES + 1) + start]++;
    s->change[kind * (AGES + 1) + age + 1]--;
}

static void begin_spell(Spells *s, int64_t page, int64_t combined, double time) {
    const int64_t kind = kind_of(s, combined), cohort = s->period[NOW];
    int64_t *facts = facts_of(s, page);
    if (kind < 0) return; /* only if a page is named twice, which nobody does */
    facts[COMBINED] = combined;
    facts[KIND] = kind;
    facts[COHORT] = cohort;
    facts[CALL] = s->counts[CALL_NUMBER];
    s->ranking->seats[page].last = time;
    s->ranking->seats[page].score = s->guard[FOLLOWS] ? 0.0 : s->worth[kind * AGES];
    facts[SCORED] = s->counts[SCORING];
    s->alive[(cohort & (s->cohorts - 1)) * s->kinds + kind]++;
}

/* -- touch -- */

/* Whether these pages can be used: 0, or why not. */
static long look_at(const Spells *s, const Rows *pages) {
    s->missing[0] = 0;
    bool usual = is_in_order(s) && rows_within(pages, s->pages);
    for (Py_ssize_t i = 0; usual && i < pages->count; i++) {
        const int64_t page = *row_at(pages, i);
        usual = s->ranking->seats[page].here && is_sound(s, facts_of(s, page)) && know(s, features_if_used(s, page));
    }
    return verdict(s, usual);
}

static void use(Spells *s, int64_t page, double time) {
    int64_t *facts = facts_of(s, page);
    end_spell(s, facts[KIND], facts[COHORT], age_bin(time - s->ranking->seats[page].last));
    if (!was_held(s, facts[CALL])) s->guard[OWED]--;
    const int64_t combined = features_if_used(s, page);
    facts[USES]++;
    begin_spell(s, page, combined, time);
}

/* Whether it could be noted that this call used these pages, and the oldest such note be forgotten; else an exception. */
static bool note_call(const Spells *s, const Rows *pages, int64_t call) {
    PyObject *number = PyLong_FromLongLong(call), *note = PyBytes_FromStringAndSize(NULL, pages->count * (Py_ssize_t)sizeof(int64_t));
    PyObject *oldest, *unused;
    char *noted = note ? PyBytes_AsString(note) : NULL;
    for (Py_ssize_t i = 0; noted && i < pages->count; i++) memcpy(noted + i * (Py_ssize_t)sizeof(int64_t), row_at(pages, i), sizeof(int64_t));
    bool good = number && note && !PyDict_SetItem(s->recent, number, note);
    Py_ssize_t first = 0;
    if (good && PyDict_Size(s->recent) > RECENT_REQUESTS && PyDict_Next(s->recent, &first, &oldest, &unused)) {
        Py_INCREF(oldest);
        good = !PyDict_DelItem(s->recent, oldest);
        Py_DECREF(oldest);
    }
    Py_XDECREF(note);
    Py_XDECREF(number);
    return good;
}

PyObject *touch(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("touch(pages, now)", given, 2)) return NULL;
    Spells *s = (Spells *)self;
    bool failed = false;
    const double time = later_of(s, real_of(arguments[1], &failed));
    Rows pages;
    if (failed || !rows_open(&pages, arguments[0], false)) return NULL;
    long due = look_at(s, &pages);
    if (!due) {
        /* No page is compared with others while some scores are old and some new. */
        for (Py_ssize_t i = 0; i < pages.count; i++) ranking_unqueue(s->ranking, *row_at(&pages, i));
        for (Py_ssize_t i = 0; i < pages.count; i++) use(s, *row_at(&pages, i), time);
        for (Py_ssize_t i = 0; i < pages.count; i++) {
            if (!s->ranking->seats[*row_at(&pages, i)].children) ranking_enqueue(s->ranking, *row_at(&pages, i));
        }
        const int64_t call = s->counts[CALL_NUMBER];
        failed = !note_call(s, &pages, call);
        s->clock[LATEST] = time;
        count_held(s, pages.count, call);
        due = end_call(s, pages.count);
    }
    rows_close(&pages);
    return failed ? NULL : PyLong_FromLong(due);
}

/* -- insert -- */

/* The page that these continue: the parent of the first, or the first parent that is not among them. */
static int64_t parent_of_all(const Spells *s, const Links *links) {
    const Rows *pages = &links->pages, *parents = &links->parents;
    Py_ssize_t i = 1;
    while (i < pages->count && *row_at(parents, i) == *row_at(pages, i - 1)) i++;
    if (i == pages->count) return *row_at(parents, 0);
    int64_t outside = ROOT;
    for (i = 0; i < pages->count; i++) s->ranking->seats[*row_at(pages, i)].here = 2; /* a mark: none of them is here */
    for (i = 0; i < pages->count; i++) {
        outside = *row_at(parents, i);
        if (outside == ROOT || s->ranking->seats[outside].here != 2) break;
        outside = ROOT;
    }
    for (i = 0; i < pages->count; i++) s->ranking->seats[*row_at(pages, i)].here = 0;
    return outside;
}

static int64_t features_if_new(const Spells *s, const Coming *coming, Py_ssize_t i) {
    const Ghost *ghost = coming->ghosts[i];
    const int64_t end = i == coming->deepest ? s->steps[END_STEP] : 0;
    return features(s, ghost ? uses_of_ghost(ghost) + 1 : 1, ghost ? generation_of_ghost(ghost) : coming->generation) + coming->new + end;
}

/* The features of a page of a request that turns out to bring new ones, so many. */
static int64_t features_if_continued(const Spells *s, int64_t page, int64_t new) {
    const int64_t before = facts_of(s, page)[COMBINED], step = s->steps[NEW_STEP];
    return before + new - before / step % s->steps[NEW_VALUES] * step;
}

/* Whether a page is one of those that the call used which is continued. */
static bool is_continued(const Spells *s, const Coming *coming, int64_t page) {
    return (uint64_t)page < (uint64_t)s->pages && s->ranking->seats[page].here && facts_of(s, page)[CALL] == coming->continued;
}

static bool is_leaf(const Spells *s, int64_t page) { return !s->ranking->seats[page].children; }

/* Whether the pages that are continued can become what they turn out to be. */
static bool can_go_on(const Spells *s, const Coming *coming) {
    bool usual = true;
    for (Py_ssize_t i = 0; usual && coming->continued >= 0 && i < coming->used.count; i++) {
        const int64_t page = *row_at(&coming->used, i);
        if (!is_continued(s, coming, page)) continue;
        usual = is_sound(s, facts_of(s, page)) && know(s, features_if_continued(s, page, coming->new));
    }
    return usual;
}

/* A page in its spell turns out to be of another kind. */
static void change_kind(Spells *s, int64_t page, int64_t combined, double time) {
    int64_t *facts = facts_of(s, page);
    const int64_t kind = kind_of(s, combined);
    if (kind < 0) return; /* only if a page is named twice, which nobody does */
    if (facts[COHORT] > s->period[NOW] - s->cohorts) {
        int64_t *alive = s->alive + (facts[COHORT] & (s->cohorts - 1)) * s->kinds;
        alive[facts[KIND]]--;
        alive[kind]++;
    }
    facts[COMBINED] = combined;
    facts[KIND] = kind;
    score_at(s, page, time);
}

static void go_on(Spells *s, const Coming *coming, double time) {
    const Rows *used = &coming->used;
    for (Py_ssize_t i = 0; i < used->count; i++) {
        const int64_t page = *row_at(used, i);
        if (is_continued(s, coming, page)) ranking_unqueue(s->ranking, page);
    }
    for (Py_ssize_t i = 0; i < used->count; i++) {
        const int64_t page = *row_at(used, i);
        if (is_continued(s, coming, page)) change_kind(s, page, features_if_continued(s, page, coming->new), time);
    }
    for (Py_ssize_t i = 0; i < used->count; i++) {
        const int64_t page = *row_at(used, i);
        if (is_continued(s, coming, page) && is_leaf(s, page)) ranking_enqueue(s->ranking, page);
    }
}

/* Whether it could be looked up which pages a call used, and so noted; else an exception. */
static bool recall(const Spells *s, int64_t call, Coming *coming) {
    PyObject *number = PyLong_FromLongLong(call);
    PyObject *note = number ? PyDict_GetItemWithError(s->recent, number) : NULL;
    char *pages;
    Py_ssize_t bytes;
    if (note && !PyBytes_AsStringAndSize(note, &pages, &bytes)) {
        Py_INCREF(note);
        coming->note = note;
        coming->used = (Rows){.first = pages, .stride = sizeof(int64_t), .count = bytes / (Py_ssize_t)sizeof(int64_t)};
        coming->continued = call;
    }
    Py_XDECREF(number);
    return !PyErr_Occurred();
}

/* A call that goes on does so once. Whether that could be noted; else an exception. */
static bool forget_call(const Spells *s, int64_t call) {
    PyObject *number = PyLong_FromLongLong(call);
    const bool good = number && !PyDict_DelItem(s->recent, number);
    Py_XDECREF(number);
    return good;
}

static bool may_come(const Spells *s, const Links *links, const Rows *names) {
    bool usual = links->pages.count > 0 && names->count == links->pages.count && is_in_order(s) && links_possible(links, s->pages, INT64_MAX);
    for (Py_ssize_t i = 0; usual && i < names->count; i++) usual = !s->ranking->seats[*row_at(&links->pages, i)].here;
    return usual;
}

/* Finds the ghosts among pages that come, and which page is the deepest; whether that is nothing unusual. */
static bool find_ghosts(const Spells *s, Coming *coming) {
    const Rows *names = &coming->names, *depths = &coming->links.depths;
    int64_t unknown = 0;
    for (Py_ssize_t i = 0; i < names->count; i++) __builtin_prefetch(&s->ghosts[first_cell(s, *row_at(names, i))]);
    for (Py_ssize_t i = 0; i < names->count; i++) {
        const Ghost *ghost = coming->ghosts[i] = find_ghost(s, *row_at(names, i));
        if (ghost && !is_sound_ghost(s, ghost)) return false;
        unknown += !ghost;
        if (*row_at(depths, i) > *row_at(depths, coming->deepest)) coming->deepest = i;
    }
    for (; coming->new < s->steps[NEW_VALUES] - 1 && unknown >> coming->new; coming->new++) continue;
    coming->new *= s->steps[NEW_STEP];
    return true;
}

/* Finds out what pages that come continue; whether that is nothing unusual. */
static bool find_before(const Spells *s, Coming *coming) {
    const int64_t before = parent_of_all(s, &coming->links);
    if (before == ROOT || !s->ranking->seats[before].here) return true;
    const int64_t *facts = facts_of(s, before);
    if (facts[GENERATION] < 0 || facts[GENERATION] >= s->generations) return false;
    coming->generation = facts[GENERATION] + 1 < s->generations ? facts[GENERATION] + 1 : s->generations - 1;
    return facts[CALL] < 0 || recall(s, facts[CALL], coming);
}

/* Kinds are numbered as they appear: those of the pages come first. */
long look_up(const Spells *s, Coming *coming) {
    s->missing[0] = 0;
    coming->continued = -1, coming->generation = 1;
    coming->ghosts = PyMem_Malloc(sizeof *coming->ghosts * (size_t)(coming->names.count + 1));
    if (!coming->ghosts || !may_come(s, &coming->links, &coming->names)) return UNUSUAL;
    if (!find_ghosts(s, coming) || !find_before(s, coming)) return UNUSUAL;
    bool usual = true;
    for (Py_ssize_t i = 0; usual && i < coming->names.count; i++) usual = know(s, features_if_new(s, coming, i));
    const long answer = verdict(s, usual);
    return answer ? answer : verdict(s, can_go_on(s, coming));
}

static void come(Spells *s, const Coming *coming, Py_ssize_t i, double time) {
    const int64_t page = *row_at(&coming->links.pages, i), combined = features_if_new(s, coming, i);
    Ghost *ghost = coming->ghosts[i];
    int64_t *facts = facts_of(s, page);
    facts[USES] = 1, facts[GENERATION] = coming->generation;
    if (ghost) {
        end_spell(s, kind_of_ghost(ghost), cohort_of_ghost(ghost), age_bin(time > ghost->last ? time - ghost->last : 0.0));
        if (was_held(s, call_of_ghost(ghost))) s->guard[OWED]++;
        facts[USES] = uses_of_ghost(ghost) + 1, facts[GENERATION] = generation_of_ghost(ghost);
        ghost->last = -INFINITY; /* a ghost no more */
    }
    facts[NAME] = *row_at(&coming->names, i);
    s->ranking->seats[page].parent = *row_at(&coming->links.parents, i);
    s->ranking->seats[page].depth = *row_at(&coming->links.depths, i);
    begin_spell(s, page, combined, time);
}

void look_away(Coming *coming) {
    Py_XDECREF(coming->note);
    PyMem_Free(coming->ghosts);
}

long let_in(Spells *s, const Coming *coming, double time) {
    if (coming->continued >= 0 && !forget_call(s, coming->continued)) return UNUSUAL;
    const Rows *pages = &coming->links.pages;
    const int64_t call = s->counts[CALL_NUMBER];
    for (Py_ssize_t i = 0; i < pages->count; i++) come(s, coming, i, time);
    for (Py_ssize_t i = pages->count - 1; i >= 0; i--) ranking_come(s->ranking, *row_at(pages, i)); /* so only leaves ever queue */
    s->clock[LATEST] = time;
    if (coming->continued >= 0) go_on(s, coming, time);
    count_held(s, pages->count, call);
    return end_call(s, pages->count);
}

PyObject *insert(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("insert(pages, parents, depths, names, now)", given, 5)) return NULL;
    Spells *s = (Spells *)self;
    bool failed = false;
    const double time = later_of(s, real_of(arguments[4], &failed));
    Coming coming = {0};
    if (failed || !links_open(&coming.links, arguments)) return NULL;
    if (!rows_open(&coming.names, arguments[3], false)) {
        links_close(&coming.links);
        return NULL;
    }
    long due = look_up(s, &coming);
    if (!due) due = let_in(s, &coming, time);
    look_away(&coming);
    rows_close(&coming.names);
    links_close(&coming.links);
    return PyErr_Occurred() ? NULL : PyLong_FromLong(due);
}
