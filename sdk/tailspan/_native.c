/* The functions that run for every line or attribute, in C. `tailspan.logs.text`, `tailspan_agent.otlp.wire`,
 * `tailspan_agent.records.framing` and `tailspan_agent.records.severity` have the same functions in Python, with the
 * same results; tests/unit/sdk/logs, tests/unit/agent/otlp and tests/unit/agent/records compare them.
 * `tailspan_agent.otlp.requests` explains the format of a record.
 *
 * Only the limited API of Python 3.11 is used: one build serves all later versions. `frame` accepts exact types only and
 * takes every length from the object that it reads; a garbage collection may run Python code between measuring and
 * writing, so it checks the room for each record.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* Compilers turn a row into one vector step: each byte of `found` counts its own column, as long as it cannot overflow. */
#define ROW 32
#define ROWS 255

PyDoc_STRVAR(count_lines_doc, "count_lines(text, /)\n--\n\n"
"See `tailspan.logs.text.count_lines`.");

static PyObject *count_lines(PyObject *Py_UNUSED(module), PyObject *text)
{
    char *bytes;
    Py_ssize_t length, lines = 0;
    if (PyBytes_AsStringAndSize(text, &bytes, &length) < 0) return NULL;
    while (length >= ROW) {
        unsigned char found[ROW] = {0};
        for (int row = 0; row < ROWS && length >= ROW; row++, bytes += ROW, length -= ROW)
            for (int i = 0; i < ROW; i++) found[i] += bytes[i] == '\n';
        for (int i = 0; i < ROW; i++) lines += found[i];
    }
    for (Py_ssize_t i = 0; i < length; i++) lines += bytes[i] == '\n';
    return PyLong_FromSsize_t(lines);
}

#define MAX_FIELDS 255
#define MAX_NUMBERED 5000 /* MAX_PAGE_LINES of tailspan.logs.page */
#define DIGEST_BYTES 8
#define TIME_BYTES 9
#define FAILED (-1)
#define TOO_LONG (-2)

typedef struct {
    const char *bytes;
    Py_ssize_t length;
} Piece;

static int piece_of(PyObject *object, Piece *piece)
{
    char *bytes;
    if (object == NULL || PyBytes_AsStringAndSize(object, &bytes, &piece->length) < 0) return -1;
    piece->bytes = bytes;
    return 0;
}

/* Reads the lines of a page in order, from a list or from a text with a newline after each. */
typedef struct {
    PyObject *list; /* NULL: the lines are a text */
    Py_ssize_t index;
    Piece text; /* the part that is still to be read */
} Cursor;

static int lines_of(PyObject *object, Cursor *lines)
{
    *lines = (Cursor){0};
    if (!PyList_Check(object)) return piece_of(object, &lines->text);
    lines->list = object;
    return 0;
}

static int next_line(Cursor *lines, Piece *line)
{
    if (lines->list != NULL) return piece_of(PyList_GetItem(lines->list, lines->index++), line);
    const char *end = lines->text.length ? memchr(lines->text.bytes, '\n', (size_t)lines->text.length) : NULL;
    if (end == NULL) {
        PyErr_SetString(PyExc_IndexError, "the text has fewer lines");
        return -1;
    }
    line->bytes = lines->text.bytes;
    line->length = end - line->bytes;
    lines->text.bytes = end + 1;
    lines->text.length -= line->length + 1;
    return 0;
}

static Py_ssize_t count_of(const Cursor *lines)
{
    if (lines->list != NULL) return PyList_Size(lines->list);
    Py_ssize_t count = 0;
    const char *at = lines->text.bytes, *end = at + lines->text.length;
    for (; at < end && (at = memchr(at, '\n', (size_t)(end - at))) != NULL; at++) count++;
    return count;
}

static int no_more(const Cursor *lines)
{
    if (lines->list != NULL ? lines->index == PyList_Size(lines->list) : lines->text.length == 0) return 0;
    PyErr_SetString(PyExc_ValueError, "the page has more lines");
    return -1;
}

/* The levels of `tailspan_agent.records.severity`, in the order of its table: of each in capitals, small letters, and
 * with a capital. */
static const char *const levels[] = {"TRACE", "DEBUG", "INFO", "NOTICE", "SUCCESS", "WARN", "WARNING", "ERR", "ERROR",
                                     "SEVERE", "CRITICAL", "FATAL", "PANIC", "ALERT", "EMERGENCY"};
#define LEVELS (Py_ssize_t)(sizeof levels / sizeof *levels)
#define LONGEST_LEVEL 9
#define UNSPECIFIED 0
#define INFO 7
#define WARNING 19
#define ERROR 25
#define FATAL 34
#define HEAD_BYTES 120
#define JSON_HEAD_BYTES 2048
#define KEY_BYTES 24
#define MOST_INDENT 40

/* The classes of ASCII characters: one look-up for each byte of a line. */
enum { DIGIT = 1, ALNUM = 2, WORD = 4, SPACE = 8, OF_TIME = 16, OF_NAME = 32, CLOSER = 64, OF_LEVEL = 128 };
static unsigned char classes[256];

static void add_class(const char *characters, unsigned char class)
{
    for (; *characters != '\0'; characters++) classes[(unsigned char)*characters] |= class;
}

static void fill_classes(void)
{
    add_class("0123456789", DIGIT | ALNUM | WORD | OF_TIME | OF_NAME);
    add_class("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", ALNUM | WORD | OF_NAME);
    add_class("_", WORD | OF_NAME);
    add_class(" \t\n\v\f\r", SPACE);
    add_class(".,:+Z-", OF_TIME);
    add_class(".:$/@-", OF_NAME);
    add_class("]})|", CLOSER);
    for (Py_ssize_t level = 0; level < LEVELS; level++) {
        const char first[] = {levels[level][0], (char)(levels[level][0] | 0x20), '\0'};
        add_class(first, OF_LEVEL);
    }
}

static int is(char c, unsigned char class) { return classes[(unsigned char)c] & class; }
static int is_upper(char c) { return (unsigned char)(c - 'A') < 26; }
static int is_lower(char c) { return (unsigned char)(c - 'a') < 26; }
static int is_one_of(char c, const char *set)
{
    while (*set != '\0' && *set != c) set++;
    return *set != '\0';
}

/* Return the place of a word in the table of severities, or UNSPECIFIED. */
static int level_of(const char *word, Py_ssize_t length)
{
    if (length < 3 || length > LONGEST_LEVEL || !is(word[0], OF_LEVEL)) return UNSPECIFIED;
    int capitals = 0;
    for (Py_ssize_t i = 0; i < length; i++) {
        if (is_upper(word[i])) capitals++;
        else if (!is_lower(word[i])) return UNSPECIFIED;
    }
    int form = capitals == length ? 0 : capitals == 0 ? 1 : capitals == 1 && is_upper(word[0]) ? 2 : -1;
    for (Py_ssize_t level = 0; form >= 0 && level < LEVELS; level++) {
        const char *name = levels[level];
        Py_ssize_t i = 0;
        while (i < length && (word[i] & ~0x20) == name[i]) i++;
        if (i == length && name[i] == '\0') return (int)(1 + 3 * level + form);
    }
    return UNSPECIFIED;
}

/* The functions below have the names and the meaning of those in `tailspan_agent.records.severity`. */

static int start_of(Piece line)
{
    const char *at = line.bytes;
    static const char glog[] = "?0000 00:00:00";
    if (line.length >= (Py_ssize_t)sizeof glog - 1 && is(at[1], DIGIT) && is_one_of(*at, "IWEF")) {
        int i = 1;
        while (glog[i] != '\0' && (glog[i] == '0' ? is(at[i], DIGIT) : at[i] == glog[i])) i++;
        if (glog[i] == '\0') return *at == 'I' ? INFO : *at == 'W' ? WARNING : *at == 'E' ? ERROR : FATAL;
    }
    Py_ssize_t start = 0, end;
    while (start < MOST_INDENT && start < line.length && is(at[start], SPACE)) start++;
    for (end = start; end < line.length && end - start <= LONGEST_LEVEL && is(at[end], ALNUM);) end++;
    return end < line.length && at[end] == ':' ? level_of(at + start, end - start) : UNSPECIFIED;
}

static int ends_with(const char *text, Py_ssize_t length, const char *end)
{
    Py_ssize_t size = (Py_ssize_t)strlen(end);
    return length >= size && memcmp(text + length - size, end, (size_t)size) == 0;
}

static int is_after_json_key(const char *head, Py_ssize_t start)
{
    static const char *const keys[] = {"\"level\"", "\"severity\"", "\"levelname\"", "\"lvl\"", "\"log.level\"",
                                       "\"log_level\""};
    Py_ssize_t least = start > KEY_BYTES ? start - KEY_BYTES : 0, at = start;
    if (at == least || head[--at] != '"') return 0;
    for (int i = 0; i < 4 && at > least && is(head[at - 1], SPACE); i++) at--;
    if (at == least || head[--at] != ':') return 0;
    for (int i = 0; i < 4 && at > least && is(head[at - 1], SPACE); i++) at--;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (ends_with(head + least, at - least, keys[i])) return 1;
    return 0;
}

static int is_after_key(const char *head, Py_ssize_t start)
{
    static const char *const keys[] = {"level=", "lvl=", "severity="};
    Py_ssize_t least = start > KEY_BYTES ? start - KEY_BYTES : 0, at = start;
    if (at > least && is_one_of(head[at - 1], "\"'")) at--;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        if (!ends_with(head + least, at - least, keys[i])) continue;
        Py_ssize_t key = at - (Py_ssize_t)strlen(keys[i]);
        if (key == 0 || (key > least && is(head[key - 1], SPACE))) return 1;
    }
    return 0;
}

static int is_after_time(const char *left, Py_ssize_t length)
{
    for (int token = 0; token < 2; token++) {
        Py_ssize_t end = length;
        while (end > 0 && is(left[end - 1], SPACE)) end--;
        if (end == length) return 0;
        Py_ssize_t at = end;
        while (at > 0 && is(left[at - 1], OF_TIME)) at--;
        for (; at + 5 <= end; at++)
            if (is(left[at], DIGIT) && is(left[at + 1], DIGIT) && left[at + 2] == ':' && is(left[at + 3], DIGIT) &&
                is(left[at + 4], DIGIT))
                return 1;
        length = end;
        while (length > 0 && is(left[length - 1], OF_NAME)) length--;
        if (length == end) return 0;
    }
    return 0;
}

static int is_before_structure(const char *head, Py_ssize_t at, Py_ssize_t length)
{
    Py_ssize_t spaces = 0;
    while (at + spaces < length && is(head[at + spaces], SPACE)) spaces++;
    at += spaces;
    if (at == length) return 0;
    if (is_one_of(head[at], ":]|")) return 1;
    if (spaces) return head[at] == '-' && at + 1 < length && is(head[at + 1], SPACE);
    return head[at] == '/';
}

static int is_after_structure(const char *head, Py_ssize_t before)
{
    char last = before > 0 ? head[before - 1] : '\0', other = before > 1 ? head[before - 2] : '\0';
    return is(last, CLOSER) || (last == ':' && is(other, CLOSER)) || (last == '-' && other == ' ');
}

static int can_begin_level(const char *head, Py_ssize_t start)
{
    return start > 0 && (is(head[start - 1], SPACE) || is_one_of(head[start - 1], "[|:"));
}

/* Return whether the text before a word in capitals makes it a level, whatever follows. */
static int is_level_by_start(const char *head, Py_ssize_t start)
{
    Py_ssize_t before = start;
    while (before > 0 && is(head[before - 1], SPACE)) before--;
    return can_begin_level(head, start) && (is_after_structure(head, before) || is_after_time(head, start));
}

static int is_level_of_text(const char *head, Py_ssize_t length, Py_ssize_t start, Py_ssize_t end, int is_capital)
{
    Py_ssize_t before = start, inner = end;
    while (before > 0 && is(head[before - 1], SPACE)) before--;
    char opener = before ? head[before - 1] : '\0';
    int is_code = opener == '[' && before > 1 && is(head[before - 2], ALNUM);
    char closer = opener == '[' && !is_code ? ']' : opener == '|' && is_capital ? '|' : '\0';
    while (inner < length && head[inner] == ' ') inner++;
    if (closer && inner < length && head[inner] == closer) return 1;
    if (is_one_of(opener, "=\"'") && is_after_key(head, start)) return 1;
    if (!is_capital) return 0;
    if (before == 0 && (end == length || is(head[end], SPACE))) return 1;
    if (can_begin_level(head, start) && is_before_structure(head, end, length)) return 1;
    return is_level_by_start(head, start);
}

static int is_after_opener(const char *head, Py_ssize_t start)
{
    while (start > 0 && head[start - 1] == ' ') start--;
    return start > 0 && is_one_of(head[start - 1], "[=\"'");
}

/* Return whether two texts differ in digits only. */
static int is_alike(const char *text, const char *other, Py_ssize_t length)
{
    Py_ssize_t at = 0;
    while (at < length) {
        if (at + 8 <= length && memcmp(text + at, other + at, 8) == 0) at += 8;
        else if (text[at] == other[at] || (is(text[at], DIGIT) && is(other[at], DIGIT))) at++;
        else return 0;
    }
    return 1;
}

/* The text before the level of an earlier line, without another word of the table. A line that starts alike has none
 * there either, so the search starts behind it. */
typedef struct {
    const char *head;
    Py_ssize_t length;
    int is_level; /* whether a word in capitals that follows is a level */
} Known;

static int find_severity(Piece line, Known *known)
{
    int started = start_of(line);
    if (started) return started;
    const char *head = line.bytes;
    Py_ssize_t length = line.length, at = 0;
    int is_json = length > 1 && *head == '{' && (head[1] == '"' || (length > 2 && head[1] == ' ' && head[2] == '"'));
    Py_ssize_t most = is_json ? JSON_HEAD_BYTES : HEAD_BYTES;
    if (length > most) length = most;
    int is_known = known->length < length && is_alike(head, known->head, known->length), is_first = 1;
    if (is_known) at = known->length;
    while (at < length) {
        while (at < length && !is(head[at], WORD)) at++;
        Py_ssize_t start = at;
        while (at < length && is(head[at], WORD)) at++;
        int level = level_of(head + start, at - start);
        if (level == UNSPECIFIED) continue;
        int is_capital = level % 3 == 1;
        int is_level = is_known && known->is_level && is_capital && start == known->length;
        if (is_level) return level;
        if (is_capital || is_after_opener(head, start))
            is_level = is_json ? at < length && head[at] == '"' && is_after_json_key(head, start)
                               : is_level_of_text(head, length, start, at, is_capital);
        if (is_level) {
            if (is_first) *known = (Known){head, start, !is_json && is_level_by_start(head, start)};
            return level;
        }
        is_first = 0;
    }
    return UNSPECIFIED;
}

PyDoc_STRVAR(find_severities_doc,
"find_severities(lines, /)\n--\n\n"
"See `tailspan_agent.records.severity.find_severities_in_python`.");

static PyObject *find_severities(PyObject *Py_UNUSED(module), PyObject *object)
{
    Cursor lines;
    if (lines_of(object, &lines) < 0) return NULL;
    Known known = {NULL, 0, 0};
    Py_ssize_t count = count_of(&lines);
    PyObject *found = PyBytes_FromStringAndSize(NULL, count);
    char *places = found != NULL ? PyBytes_AsString(found) : NULL;
    for (Py_ssize_t i = 0; found != NULL && i < count; i++) {
        Piece line;
        if (next_line(&lines, &line) < 0) Py_CLEAR(found);
        else places[i] = (char)find_severity(line, &known);
    }
    return found;
}

static int varint_length(uint64_t value)
{
    int length = 1;
    while (value >= 0x80) {
        value >>= 7;
        length++;
    }
    return length;
}

static char *put_varint(char *at, uint64_t value)
{
    while (value >= 0x80) {
        *at++ = (char)(value | 0x80);
        value >>= 7;
    }
    *at++ = (char)value;
    return at;
}

static char *put(char *at, Piece piece)
{
    memcpy(at, piece.bytes, (size_t)piece.length);
    return at + piece.length;
}

static char *put_hex(char *at, const char *bytes, size_t count)
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < count; i++) {
        *at++ = digits[(unsigned char)bytes[i] >> 4];
        *at++ = digits[bytes[i] & 15];
    }
    return at;
}

static char *put_time(char *at, uint64_t time)
{
    *at++ = 0x09; /* LogRecord.time_unix_nano, fixed64 */
    for (int i = 0; i < 8; i++) *at++ = (char)(time >> 8 * i);
    return at;
}

typedef struct {
    PyObject *lines, *runs;
    Piece severities, digests;
    Piece fields[MAX_FIELDS];
    Py_ssize_t field_count, max_body;
} Page;

typedef struct {
    Py_ssize_t lines;
    uint64_t time;
    Piece shared;
} Run;

static int run_at(PyObject *runs, Py_ssize_t index, Run *run)
{
    PyObject *tuple = PyList_GetItem(runs, index);
    if (tuple == NULL || !PyTuple_Check(tuple) || PyTuple_Size(tuple) != 3) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "a run must be a tuple of three");
        return -1;
    }
    run->lines = PyLong_AsSsize_t(PyTuple_GetItem(tuple, 0));
    if (PyErr_Occurred()) return -1;
    run->time = PyLong_AsUnsignedLongLong(PyTuple_GetItem(tuple, 1));
    return PyErr_Occurred() ? -1 : piece_of(PyTuple_GetItem(tuple, 2), &run->shared);
}

/* One record: its line, and the length in bytes of its body, of its fields, and of the record with tag and length. */
typedef struct {
    Piece line, severity;
    uint64_t body, fields, record;
} Record;

static void measure(const Page *page, const Run *run, Record *record)
{
    uint64_t length = (uint64_t)record->line.length;
    record->body = 1 + varint_length(length) + length;
    record->fields = record->severity.length + 1 + varint_length(record->body) + record->body + TIME_BYTES +
                     run->shared.length + (page->digests.length ? 2 * DIGEST_BYTES : 4);
    record->record = 1 + varint_length(record->fields) + record->fields;
}

static char *put_record(char *at, const Record *record, const Run *run, Py_ssize_t ordinal, const char *digest)
{
    *at++ = 0x12; /* ScopeLogs.log_records */
    at = put_varint(at, record->fields);
    at = put(at, record->severity);
    *at++ = 0x2a; /* LogRecord.body */
    at = put_varint(at, record->body);
    *at++ = 0x0a; /* AnyValue.string_value */
    at = put_varint(at, (uint64_t)record->line.length);
    at = put(at, record->line);
    at = put_time(at, run->time + (uint64_t)ordinal);
    at = put(at, run->shared);
    if (digest != NULL) return put_hex(at, digest, DIGEST_BYTES);
    char number[] = {(char)(ordinal >> 8), (char)ordinal};
    return put_hex(at, number, sizeof number);
}

/* The records of a page in pieces, as many records in each as fit. */
typedef struct {
    Py_ssize_t most, copied; /* the most that a piece may take in a store that adds `copied` bytes to each record */
    Py_ssize_t length, count; /* of the piece that is being measured */
    PyObject *list; /* of the pieces: bytes, and their number of records */
} Pieces;

static int end_piece(Pieces *pieces)
{
    if (!pieces->count) return 0;
    PyObject *piece = PyBytes_FromStringAndSize(NULL, pieces->length);
    PyObject *pair = piece != NULL ? Py_BuildValue("Nn", piece, pieces->count) : NULL;
    int failed = pair == NULL || PyList_Append(pieces->list, pair) < 0;
    Py_XDECREF(pair);
    pieces->length = pieces->count = 0;
    return failed ? -1 : 0;
}

static int add_record(Pieces *pieces, uint64_t record)
{
    if (record > (uint64_t)(PY_SSIZE_T_MAX / 2 - pieces->length)) {
        PyErr_NoMemory();
        return -1;
    }
    Py_ssize_t length = pieces->length + (Py_ssize_t)record;
    int fits = length <= pieces->most && pieces->copied <= (pieces->most - length) / (pieces->count + 1);
    if (!fits && end_piece(pieces) < 0) return -1;
    pieces->length += (Py_ssize_t)record;
    pieces->count++;
    return 0;
}

/* Where the next record is written. */
typedef struct {
    PyObject *list; /* NULL: nothing is written yet */
    Py_ssize_t next; /* index of the next piece */
    char *at;
    Py_ssize_t left; /* bytes of this piece */
} Output;

static int make_room(Output *output, uint64_t record)
{
    while (output->left == 0) {
        PyObject *pair = PyList_GetItem(output->list, output->next++);
        Piece piece;
        if (pair == NULL || piece_of(PyTuple_GetItem(pair, 0), &piece) < 0) return -1;
        output->at = (char *)piece.bytes;
        output->left = piece.length;
    }
    if (record > (uint64_t)output->left) {
        PyErr_SetString(PyExc_SystemError, "the lines changed while they were framed");
        return -1;
    }
    output->left -= (Py_ssize_t)record;
    return 0;
}

/* Measure the records of all lines, and make the pieces for them; or write them, if `output` has a list.
 * Return 0, FAILED, or TOO_LONG. */
static int write_records(const Page *page, Pieces *pieces, Output *output)
{
    Py_ssize_t index = 0, count = page->severities.length, runs = PyList_Size(page->runs);
    Cursor lines;
    if (lines_of(page->lines, &lines) < 0) return FAILED;
    for (Py_ssize_t r = 0; r < runs; r++) {
        Run run;
        if (run_at(page->runs, r, &run) < 0) return FAILED;
        int can_be_numbered = run.lines <= MAX_NUMBERED || page->digests.length;
        if (run.lines < 0 || run.lines > count - index || !can_be_numbered) {
            PyErr_SetString(PyExc_ValueError, "a run has too many lines");
            return FAILED;
        }
        for (Py_ssize_t ordinal = 0; ordinal < run.lines; ordinal++, index++) {
            unsigned char severity = (unsigned char)page->severities.bytes[index];
            Record record;
            if (next_line(&lines, &record.line) < 0) return FAILED;
            if (severity >= page->field_count) continue;
            if (record.line.length > page->max_body) return TOO_LONG;
            record.severity = page->fields[severity];
            measure(page, &run, &record);
            if (output->list == NULL) {
                if (add_record(pieces, record.record) < 0) return FAILED;
                continue;
            }
            if (make_room(output, record.record) < 0) return FAILED;
            const char *digest = page->digests.length ? page->digests.bytes + DIGEST_BYTES * index : NULL;
            output->at = put_record(output->at, &record, &run, ordinal, digest);
        }
    }
    if (index != count) {
        PyErr_SetString(PyExc_ValueError, "the runs have fewer lines");
        return FAILED;
    }
    return no_more(&lines) < 0 || end_piece(pieces) < 0 ? FAILED : 0;
}

PyDoc_STRVAR(frame_doc,
"frame(lines, severities, fields, runs, digests, max_body, most, copied, /)\n--\n\n"
"See `tailspan_agent.records.framing.frame`.");

static PyObject *frame(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *severities, *fields, *digests;
    Page page;
    Pieces pieces = {0};
    Output output = {0};
    if (!PyArg_ParseTuple(args, "OSO!O!Snnn", &page.lines, &severities, &PyTuple_Type, &fields, &PyList_Type, &page.runs,
                          &digests, &page.max_body, &pieces.most, &pieces.copied))
        return NULL;
    if (pieces.most < 0 || pieces.copied < 0) return PyErr_Format(PyExc_ValueError, "a limit is negative");
    page.field_count = PyTuple_Size(fields);
    if (page.field_count > MAX_FIELDS) return PyErr_Format(PyExc_ValueError, "there are more than 255 severities");
    for (Py_ssize_t i = 0; i < page.field_count; i++)
        if (piece_of(PyTuple_GetItem(fields, i), &page.fields[i]) < 0) return NULL;
    if (piece_of(severities, &page.severities) < 0 || piece_of(digests, &page.digests) < 0) return NULL;
    if (page.digests.length && page.digests.length != DIGEST_BYTES * page.severities.length)
        return PyErr_Format(PyExc_ValueError, "there must be as many digests as lines");
    if ((pieces.list = PyList_New(0)) == NULL) return NULL;
    int result = write_records(&page, &pieces, &output);
    output.list = pieces.list;
    if (result == 0) result = write_records(&page, &pieces, &output);
    if (result == 0 && (output.left || output.next != PyList_Size(pieces.list))) {
        PyErr_SetString(PyExc_SystemError, "the lines changed while they were framed");
        result = FAILED;
    }
    if (result == 0) return pieces.list;
    Py_DECREF(pieces.list);
    if (result == TOO_LONG) Py_RETURN_NONE;
    return NULL;
}

/* The value of an attribute; `body` is the length of its AnyValue without the length of a text. */
typedef struct {
    char tag; /* of the AnyValue's field */
    Piece text;
    uint64_t number;
    uint64_t body;
} Value;

static uint64_t field_length(uint64_t length) { return 1 + varint_length(length) + length; }

static int text_of(PyObject *object, Piece *text)
{
    if ((text->bytes = PyUnicode_AsUTF8AndSize(object, &text->length)) != NULL) return 1;
    if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) return -1;
    PyErr_Clear();
    return 0;
}

/* Return 1; 0 for what only the form in Python encodes; -1 for an error. */
static int value_of(PyObject *object, Value *value)
{
    if (PyUnicode_Check(object)) {
        value->tag = 0x0a;
        int known = text_of(object, &value->text);
        if (known == 1) value->body = field_length((uint64_t)value->text.length);
        return known;
    }
    if (PyLong_Check(object)) {
        int overflow;
        value->tag = PyBool_Check(object) ? 0x10 : 0x18;
        value->number = (uint64_t)PyLong_AsLongLongAndOverflow(object, &overflow);
        value->body = 1 + varint_length(value->number);
        return overflow == 0;
    }
    if (PyFloat_Check(object)) {
        double number = PyFloat_AsDouble(object);
        value->tag = 0x21;
        memcpy(&value->number, &number, sizeof number);
        value->body = 9;
        return 1;
    }
    return 0;
}

static char *put_value(char *at, const Value *value)
{
    *at++ = value->tag;
    if (value->tag == 0x0a) return put(put_varint(at, (uint64_t)value->text.length), value->text);
    if (value->tag != 0x21) return put_varint(at, value->number);
    for (int i = 0; i < 8; i++) *at++ = (char)(value->number >> 8 * i);
    return at;
}

PyDoc_STRVAR(usual_attributes_doc, "usual_attributes(number, attributes, /)\n--\n\n"
"See `tailspan_agent.otlp.wire.attributes_fields`; None for attributes that only the form in Python encodes.");

static PyObject *usual_attributes(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned char number;
    PyObject *attributes, *encoded = NULL;
    if (!PyArg_ParseTuple(args, "bO", &number, &attributes)) return NULL;
    if (!PyDict_CheckExact(attributes)) Py_RETURN_NONE;
    /* Measured first, then written. Nothing in between runs Python code. */
    for (char *at = NULL, *end = NULL;;) {
        PyObject *key, *object;
        Py_ssize_t position = 0;
        uint64_t length = 0;
        while (PyDict_Next(attributes, &position, &key, &object)) {
            Piece name;
            Value value;
            int known = PyUnicode_Check(key) ? text_of(key, &name) : 0;
            if (known == 1) known = value_of(object, &value);
            if (known != 1) {
                Py_XDECREF(encoded);
                if (known < 0) return NULL;
                Py_RETURN_NONE;
            }
            uint64_t pair = field_length((uint64_t)name.length) + field_length(value.body);
            uint64_t field = varint_length((uint64_t)number << 3) + varint_length(pair) + pair;
            length += field;
            if (at == NULL) continue;
            if (field > (uint64_t)(end - at)) break;
            at = put_varint(put_varint(at, (uint64_t)number << 3 | 2), pair);
            *at++ = 0x0a; /* KeyValue.key */
            at = put(put_varint(at, (uint64_t)name.length), name);
            *at++ = 0x12; /* KeyValue.value */
            at = put_value(put_varint(at, value.body), &value);
        }
        if (at != NULL && at == end) return encoded;
        if (at != NULL) {
            Py_DECREF(encoded);
            return PyErr_Format(PyExc_SystemError, "the attributes changed while they were encoded");
        }
        if (length > PY_SSIZE_T_MAX) return PyErr_NoMemory();
        if ((encoded = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length)) == NULL || length == 0) return encoded;
        at = PyBytes_AsString(encoded);
        end = at + length;
    }
}

#ifdef __linux__
#include <unistd.h>
#include <sys/syscall.h>

PyDoc_STRVAR(system_call_doc, "system_call(number, first, second, third=0, /)\n--\n\n"
"See `tailspan.local.process_tree`.");

static PyObject *system_call(PyObject *Py_UNUSED(module), PyObject *args)
{
    long number, first, third = 0;
    PyObject *second;
    if (!PyArg_ParseTuple(args, "llO|l", &number, &first, &second, &third)) return NULL;
    long value;
    if (PyBytes_Check(second)) value = (long)(intptr_t)PyBytes_AsString(second);
    else value = PyLong_AsLong(second);
    if (PyErr_Occurred()) return NULL;
    return PyLong_FromLong(syscall(number, first, value, third, 8L));
}
#endif

static PyMethodDef methods[] = {
#ifdef __linux__
    {"system_call", system_call, METH_VARARGS, system_call_doc},
#endif
    {"count_lines", count_lines, METH_O, count_lines_doc},
    {"find_severities", find_severities, METH_O, find_severities_doc},
    {"frame", frame, METH_VARARGS, frame_doc},
    {"usual_attributes", usual_attributes, METH_VARARGS, usual_attributes_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_compiled",
    .m_doc = "The functions that run for every line or attribute, in C.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__compiled(void)
{
    fill_classes();
    return PyModuleDef_Init(&definition);
}
