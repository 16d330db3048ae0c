"The catalogue of data sets: rules, counts, files in every form, errors before work."
import csv
import gzip
import json
import logging
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dpo_lab import data
from dpo_lab.data import DATASETS, Columns, DPODatasetBuilder, Drop, PreferencePair, convert, data_fingerprint
from dpo_lab.data import load_pairs, overlap, read_rows, take_test, token_audit

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT/'dpo_lab/assets/examples'
PARTS = ('prompt', 'chosen', 'rejected')

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "Arrow copies go to a folder of the test, and nothing looks for the hub."
    import datasets
    import huggingface_hub
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')
    for place in (datasets.config, huggingface_hub.constants): monkeypatch.setattr(place, 'HF_HUB_OFFLINE', True)

def said(role, text): return {'role': role, 'content': text}
PAIR = PreferencePair([said('user', 'Q')], [said('assistant', 'A')], [said('assistant', 'B')], id='x', strength=2.)
def text(pair): return [[(m['role'], m['content']) for m in getattr(pair, part)] for part in PARTS]
def content(pairs): return sorted(text(p) for p in pairs.train + pairs.test)
def write(path, rows):
    Path(path).write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows), encoding='utf-8')
    return str(path)

# ---- each data set, by its rule ----

EXPECTED = dict(
    hhh=dict(rows=11, dropped={'prompt differs': 2, 'not alternating': 1, 'empty completion': 1,
                               "last turn not the assistant's": 1, 'identical completions': 1}),
    helpsteer3=dict(rows=6, dropped={'tie': 1, 'empty completion': 1, 'identical completions': 1}),
    ultrafeedback=dict(rows=5, dropped={'tie': 1, 'empty completion': 1}),
    tulu3=dict(rows=6, dropped={'prompt differs': 2, 'identical completions': 1}),
    arena=dict(rows=6, dropped={'tie': 1, 'both bad': 1, 'first user message differs': 1, 'not only text': 1}),
    helpsteer2=dict(rows=5, dropped={'tie': 1, 'only one response': 1}))

@pytest.mark.parametrize('name', EXPECTED)
def test_every_row_of_a_fixture_is_kept_or_counted_under_its_reason(name):
    audit = load_pairs(name, str(FIXTURES/f'{name}.jsonl'), test_fraction=0).audit
    assert (audit.rows, audit.dropped) == (EXPECTED[name]['rows'], EXPECTED[name]['dropped'])
    assert audit.kept == audit.rows - sum(audit.dropped.values())

@pytest.mark.parametrize('name', EXPECTED)
def test_a_fixture_gives_the_same_pairs_from_parquet_from_a_folder_and_from_disk(name, tmp_path):
    import datasets
    rows = list(read_rows(FIXTURES/f'{name}.jsonl'))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path/'rows.parquet')
    (tmp_path/'folder').mkdir()
    write(tmp_path/'folder'/'train.jsonl', rows)
    table.save_to_disk(tmp_path/'saved')
    expected = content(load_pairs(name, str(FIXTURES/f'{name}.jsonl')))
    for place in ('rows.parquet', 'folder', 'saved'): assert content(load_pairs(name, str(tmp_path/place))) == expected

def test_hh_turns_open_only_after_a_blank_line():
    pairs = load_pairs('hhh', str(FIXTURES/'hhh.jsonl'), test_fraction=0).train
    assert pairs[2].prompt == [said('user', 'What does "Human: hello" mean in a log?')]
    assert pairs[2].chosen[0]['content'].endswith('\nHuman: is the speaker.')
    assert len(pairs[1].prompt) == 3

def test_helpsteer3_prefers_the_first_response_below_zero_and_keeps_the_strength():
    path = str(FIXTURES/'helpsteer3.jsonl')
    pairs = load_pairs('helpsteer3', path, test_fraction=0).train
    assert [(p.chosen[0]['content'][:5], p.strength, p.weight) for p in pairs] == [
        ('11 is', 3, None), ('print', 2, None), ('Go to', 1, None)]
    weighed = load_pairs('helpsteer3', path, test_fraction=0, strength_as='weight').train
    assert [p.weight for p in weighed] == [3, 2, 1]

def test_tulu3_keeps_every_message_after_the_common_ones():
    pairs = load_pairs('tulu3', str(FIXTURES/'tulu3.jsonl'), test_fraction=0).train
    assert [(len(p.prompt), [m['content'] for m in p.chosen]) for p in pairs][1:] == [
        (3, ['It met a crow with cheese.']), (1, ['One.', 'And?', 'Two.'])]
    assert pairs[0].id == 'mix_0'

def test_arena_takes_the_voted_side_and_the_shared_messages():
    first, second = load_pairs('arena', str(FIXTURES/'arena.jsonl'), test_fraction=0).train
    assert first.chosen[0]['content'].startswith('May')
    assert [m['content'] for m in second.chosen] == ['Hey there!', 'Rhyme on sea.', 'Free as the sea.']
    assert second.prompt == [said('user', 'Hi')]

def test_helpsteer2_sets_the_best_response_of_a_prompt_against_its_worst():
    egg, boat, bird = load_pairs('helpsteer2', str(FIXTURES/'helpsteer2.jsonl'), test_fraction=0).train
    assert (egg.strength, bird.rejected[0]['content'], bird.strength) == (3, 'Dog.', 4)
    assert [m['role'] for m in boat.prompt] == ['user', 'assistant', 'user']
    assert boat.prompt[1]['content'] == 'Sea Lark.'

@pytest.mark.parametrize('name', ['helpsteer3', 'ultrafeedback', 'arena', 'helpsteer2'])
def test_a_tie_is_skipped_or_kept_with_one_half_never_won(name):
    path = str(FIXTURES/f'{name}.jsonl')
    assert all(p.soft_label is None for p in load_pairs(name, path, test_fraction=0).train)
    tied = [p for p in load_pairs(f'{name}(ties=keep)', path, test_fraction=0).train if p.soft_label is not None]
    assert [p.soft_label for p in tied] == [.5] and tied[0].chosen != tied[0].rejected

def test_a_row_without_a_rating_is_dropped(tmp_path):
    row = next(read_rows(FIXTURES/'ultrafeedback.jsonl'))
    path = write(tmp_path/'r.jsonl', [row, row | dict(chosen_avg_rating=None)])
    pairs = load_pairs('ultrafeedback', path, test_fraction=0)
    assert pairs.audit.dropped == {'no rating': 1}

# ---- the hub ----

class Hub:
    "Stands in for load_dataset: remembers what was asked for, answers with fixtures."
    def __init__(self, splits): self.splits, self.calls = splits, []
    def __call__(self, *args, **kwargs):
        import datasets
        self.calls.append((args, kwargs))
        return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in self.splits.items()})

PINNED = dict(hhh=('Anthropic/hh-rlhf', None), helpsteer3=('nvidia/HelpSteer3', 'preference'),
              ultrafeedback=('argilla/ultrafeedback-binarized-preferences', None),
              tulu3=('allenai/llama-3.1-tulu-3-8b-preference-mixture', None),
              arena=('lmarena-ai/arena-human-preference-140k', None), helpsteer2=('nvidia/HelpSteer2', None))

@pytest.mark.parametrize('name', PINNED)
def test_a_named_data_set_is_read_from_the_hub_at_its_pinned_commit(name, monkeypatch):
    import datasets
    hub = Hub({'train': list(read_rows(FIXTURES/f'{name}.jsonl'))})
    monkeypatch.setattr(datasets, 'load_dataset', hub)
    pairs = load_pairs(name)
    assert hub.calls == [(PINNED[name], dict(revision=DATASETS[name].hub_revision))]
    assert len(DATASETS[name].hub_revision) == 40 and int(DATASETS[name].hub_revision, 16)
    assert pairs.audit.revision == DATASETS[name].hub_revision and pairs.audit.source == PINNED[name][0]
    assert load_pairs(name, dataset_revision='v2').audit.revision == 'v2'
    assert hub.calls[-1][1] == dict(revision='v2')

def test_a_hub_id_is_read_by_column_from_main_unless_told_otherwise(monkeypatch):
    import datasets
    rows = [dict(prompt=f'{i}?', chosen='Yes.', rejected='No.') for i in range(4)]
    hub = Hub(dict(train_prefs=rows, test_prefs=rows[:1]))
    monkeypatch.setattr(datasets, 'load_dataset', hub)
    with pytest.raises(ValueError, match="has no split 'train', only train_prefs, test_prefs: name one with split="):
        load_pairs('someone/pairs')
    pairs = load_pairs('someone/pairs(split=train_prefs,held_out=test_prefs,config=all)')
    assert (len(pairs.train), len(pairs.test), pairs.audit.revision) == (4, 1, 'main')
    assert hub.calls[-1] == (('someone/pairs', 'all'), dict(revision=None))

def test_the_test_split_is_shuffled_as_datasets_does_and_cut_to_1024(monkeypatch):
    import datasets
    hh = lambda i: dict(chosen=f'\n\nHuman: {i}\n\nAssistant: a', rejected=f'\n\nHuman: {i}\n\nAssistant: b')
    hub = Hub(dict(train=[hh(i) for i in range(20)], test=[hh(i) for i in range(2000)]))
    monkeypatch.setattr(datasets, 'load_dataset', hub)
    pairs = load_pairs('hhh')
    expected = datasets.Dataset.from_list(hub.splits['test']).shuffle(seed=0).select(range(1024))['chosen']
    assert ['\n\nHuman: ' + p.prompt[0]['content'] + '\n\nAssistant: a' for p in pairs.test] == list(expected)
    assert pairs.audit.overlap['prompts'] == sum(int(p.prompt[0]['content']) < 20 for p in pairs.test)

def test_a_data_set_without_test_split_gives_up_the_first_rows_of_its_shuffle(monkeypatch):
    import datasets
    row = next(read_rows(FIXTURES/'ultrafeedback.jsonl'))
    rows = [row | dict(instruction=str(i)) for i in range(12_000)]
    monkeypatch.setattr(datasets, 'load_dataset', Hub(dict(train=rows)))
    pairs = load_pairs('ultrafeedback')
    expected = datasets.Dataset.from_list(rows).shuffle(seed=0).select(range(1024))['instruction']
    assert [p.prompt[0]['content'] for p in pairs.test] == list(expected)
    assert len(pairs.train) == 12_000 - 1024

def test_without_the_hub_the_error_says_what_to_do():
    says = r"cannot load 'Anthropic/hh-rlhf' at revision 09be8c5.*dataset_path= at a local copy"
    with pytest.raises(OSError, match=says): load_pairs('hhh')

# ---- files in every form ----

HH = {'user': '\n\nHuman: ', 'assistant': '\n\nAssistant: '}
SHAREGPT = {'user': 'human', 'assistant': 'gpt'}
def as_transcript(messages): return ''.join(HH[m['role']] + m['content'] for m in messages)
def as_sharegpt(messages):
    return [{'from': SHAREGPT.get(m['role'], m['role']), 'value': m['content']} for m in messages]
def whole(row): return {k: row['prompt'] + row[k] for k in ('chosen', 'rejected')}
def sharegpt(row):
    sides = {k: as_sharegpt(row[k])[0] for k in ('chosen', 'rejected')}
    return dict(conversations=as_sharegpt(row['prompt']), **sides)
def labelled(row):
    return dict(comparison=dict(prompt_conversation=row['prompt'], completion_A=row['rejected'],
                                completion_B=row['chosen']), label='B')
def system(row):
    first, *rest = row['prompt']
    return row if first['role'] != 'system' else row | dict(prompt=rest, system=first['content'])
FORMS = dict(messages=dict, whole=whole, sharegpt=sharegpt, labelled=labelled, system=system,
             redundant=lambda r: dict(prompt=r['prompt'][-1]['content'], **whole(r)))

def preferences(): return list(read_rows(shared('preferences_en.jsonl')))

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('kind', ['jsonl', 'json', 'jsonl.gz', 'csv', 'parquet', 'folder'])
def test_a_file_gives_the_same_pairs_in_every_form_and_kind(form, kind, tmp_path):
    import datasets
    rows, path = [FORMS[form](r) for r in preferences()], tmp_path/f'pairs.{kind}'
    names = sorted({k for r in rows for k in r})
    if kind == 'jsonl': write(path, rows)
    if kind == 'json': path.write_text(json.dumps(rows))
    if kind == 'jsonl.gz': path.write_bytes(gzip.compress(''.join(json.dumps(r) + '\n' for r in rows).encode()))
    if kind == 'parquet': datasets.Dataset.from_list([{k: r.get(k) for k in names} for r in rows]).to_parquet(path)
    if kind == 'folder': path.mkdir(), write(path/'train.jsonl', rows)
    if kind == 'csv':
        with open(path, 'w', newline='', encoding='utf-8') as f:
            table = csv.DictWriter(f, names)
            table.writeheader()
            for r in rows: table.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()})
    expected = sorted([[(m['role'], m['content']) for m in r[part]] for part in PARTS] for r in preferences())
    assert content(load_pairs(str(path))) == expected

def test_transcripts_and_messages_give_the_same_pairs(tmp_path):
    path = shared('preferences_en_hh_format.jsonl')
    rows = [r for r in preferences() if r['prompt'][0]['role'] != 'system']
    made = write(tmp_path/'t.jsonl', [{k: as_transcript(v) for k, v in whole(r).items()} for r in rows])
    def apart(r): return {k: r[k][0]['content'] for k in ('chosen', 'rejected')}
    prompts = [as_transcript(r['prompt']) + '\n\nAssistant:' for r in rows]
    by_prompt = write(tmp_path/'p.jsonl', [dict(prompt=p, **apart(r)) for p, r in zip(prompts, rows)])
    messages = content(load_pairs(write(tmp_path/'m.jsonl', rows)))
    assert len(messages) == 219
    for same in (load_pairs(str(path)), load_pairs('hhh', str(path)), load_pairs(made), load_pairs(by_prompt)):
        assert content(same) == messages

def test_the_shared_pairs_are_split_by_prompt_and_audited():
    pairs = load_pairs(str(shared('preferences_en.jsonl')))
    assert pairs.audit.rows == pairs.audit.kept == 299 and not pairs.audit.dropped
    assert 25 <= len(pairs.test) <= 40 and pairs.audit.overlap == dict(prompts=0, test_pairs=0)
    longer = np.mean([len(p.chosen[0]['content']) > len(p.rejected[0]['content']) for p in pairs.train])
    assert pairs.audit.train['chosen_longer'] == pytest.approx(longer, abs=1e-4)

def test_columns_of_a_pair_ride_along(tmp_path):
    row = dict(prompt='Q?', chosen='A.', rejected='B.', weight=2, soft_label=.7, offset=.1, strength=3, id=17)
    bare = dict(prompt='R?', chosen='A.', rejected='B.', weight=None)
    first, second = load_pairs(write(tmp_path/'r.jsonl', [row, bare]), test_fraction=0).train
    assert (first.weight, first.soft_label, first.offset, first.strength, first.id) == (2., .7, .1, 3., '17')
    assert (second.weight, second.soft_label, second.id) == (None, None, 'train:1')

def test_text_is_never_reinterpreted(tmp_path):
    odd = (('2024-05-01', 'NA'), ('null', '1e5'), ('[1, 2]', '{"a": 1}'), ('007', 'True'))
    rows = [dict(prompt='When?', chosen=c, rejected=r) for c, r in odd]
    with open(tmp_path/'r.csv', 'w', newline='', encoding='utf-8') as f:
        table = csv.DictWriter(f, PARTS)
        table.writeheader()
        table.writerows(rows)
    for path in (tmp_path/'r.csv', write(tmp_path/'r.jsonl', rows)):
        pairs = load_pairs(str(path), test_fraction=0).train
        assert [(p.chosen[0]['content'], p.rejected[0]['content']) for p in pairs] == list(odd)

def test_a_completion_that_looks_like_something_else_stays_a_completion(tmp_path):
    odd = ['Assistant: hello', 'Human: hello', '[{"role": "user", "content": "hello"}]', '{"from": "a", "value": "b"}']
    rows = [dict(prompt=odd[1], chosen=c, rejected='plain') for c in odd]
    pairs = load_pairs(write(tmp_path/'r.jsonl', rows), test_fraction=0).train
    assert [text(p)[:2] for p in pairs] == [[[('user', odd[1])], [('assistant', c)]] for c in odd]
    base = next(read_rows(FIXTURES/'ultrafeedback.jsonl'))
    odd.append('\n\nHuman: more\n\nAssistant: yes')
    named = [base | dict(instruction=c, chosen_response=c) for c in odd]
    pairs = load_pairs('ultrafeedback', write(tmp_path/'u.jsonl', named), test_fraction=0).train
    assert [text(p)[:2] for p in pairs] == [[[('user', c)], [('assistant', c)]] for c in odd]

def test_a_folder_named_like_a_hub_id_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path/'Anthropic'/'hh-rlhf').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'Anthropic/hh-rlhf' is a folder here: give it as dataset_path="):
        load_pairs('hhh')

def test_rows_of_a_file_are_read_one_at_a_time(tmp_path):
    (tmp_path/'r.jsonl').write_text('{"a": 1}\nnot json\n')
    rows = read_rows(tmp_path/'r.jsonl')
    assert next(rows) == {'a': 1}
    with pytest.raises(ValueError, match=r'r\.jsonl, line 2: not JSON'): next(rows)

# ---- what users may ask for, and small mistakes ----

def rows_of(*rows): return lambda t: write(t/'r.jsonl', rows)
def text_of(name, content): return lambda t: str((t/name).write_text(content) and t/name)
TOY = rows_of(dict(prompt=PAIR.prompt, chosen=PAIR.chosen, rejected=PAIR.rejected, reward_chosen=0, reward_rejected=1))
MISTAKES = [    # what is asked, where a {} stands for a file that holds ..., and what comes back
    ('ultrafedback', None, r"unknown dataset 'ultrafedback'. Did you mean 'ultrafeedback'\? Choose one of toy, hhh"),
    ('missing.jsonl', None, "no file or folder 'missing.jsonl'"),
    ('{}', rows_of(), r'no pair is left of 0 rows of .*r\.jsonl: there are no rows'),
    ('{}', rows_of(*[dict(prompt='a', chosen='b', rejected='b')]*3), r'no pair is left of .* rows of .*: \d identical'),
    ('{}', rows_of(dict(question='a', good='b', bad='c')), r'question, good, bad fit none of .*jsonl\(prompt=question'),
    ('{}', rows_of(dict(prompt='a', conversations=[], chosen='b', rejected='c')), 'are ambiguous, they fit prompt'),
    ('{}', rows_of(dict(question='a', chosen='b', rejected='c')), 'no column holds its prompt'),
    ('{}(prompt=a,chosen=b,rejected=d)', rows_of(dict(a='a', b='b', c='c')), 'no column d: found a, b, c'),
    ('{}', rows_of(dict(prompt='a', chosen='b', rejected='c'), [1]), 'line 2: a row is'),
    ('{}', text_of('r.csv', 'prompt,chosen,rejected\na,b,c,d\n'), 'line 2: more cells than columns'),
    ('{}', text_of('r.txt', 'a'), r"cannot read rows from 'r.txt': its name must end in one of \.jsonl"),
    ('nowhere.at.all:Builder', None, "dataset 'nowhere.at.all:Builder': cannot import"),
    ('dpo_lab.data:DPODatasetBuildr', None, "Did you mean 'DPODatasetBuilder'"),
    ('dpo_lab.data:load_pairs', None, 'must be a subclass of DPODatasetBuilder'),
    ('dpo_lab.data:DPODatasetBuilder', None, 'has no data set on the hub: give dataset_path='),
    ('toy(strength_as=weight,dataset_path={})', TOY, 'row 0: Toy.row_to_pair fails with ValueError: weight is -1'),
    ('hhh(tie=keep)', None, "hhh has no field 'tie'. Did you mean 'ties'"),
    ('hhh(ties)', None, 'write fields as name=value'),
    ('hhh(ties=win)', None, "ties is 'win': choose one of skip, keep"),
    ('hhh(test_fraction=1)', None, r'test_fraction is 1: give a share in \[0, 1\)'),
    ('hhh(dataset_path=missing)', None, "no file or folder 'missing'"),
    ('hhh(dataset_path={})', rows_of(dict(text='a')), r'r\.jsonl lacks chosen, rejected: HHH reads .* found text'),
    ('hhh(dataset_path={},dataset_revision=v1)', rows_of(dict(text='a')), "dataset_revision='v1' is for the hub"),
    ('{0}(dataset_path={0})', rows_of(dict(text='a')), 'already says where the rows are')]

@pytest.mark.parametrize(('ask', 'file', 'says'), MISTAKES)
def test_a_small_mistake_is_answered_before_any_work(ask, file, says, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        load_pairs(ask.format(file(tmp_path)) if file else ask)

def test_columns_can_be_named(tmp_path):
    path = write(tmp_path/'orca.jsonl', [dict(system='Be kind.', question='Why?', chosen='So.', rejected='No.')]*2)
    pair = load_pairs(f'{path}(prompt=question)', test_fraction=0).train[0]
    assert text(pair) == [[('system', 'Be kind.'), ('user', 'Why?')], [('assistant', 'So.')], [('assistant', 'No.')]]
    assert text(Columns(dataset_path=path, prompt='question', test_fraction=0)().train[0]) == text(pair)

def test_a_tie_label_is_no_win(tmp_path):
    row = labelled(dict(prompt=PAIR.prompt, chosen=PAIR.chosen, rejected=PAIR.rejected))
    path = write(tmp_path/'r.jsonl', [row, row | dict(label='Tie'), row | dict(label='?')])
    assert load_pairs(path, test_fraction=0).audit.dropped == {'tie': 1, 'unknown label': 1}

BUILDER = '''
from dpo_lab.data import DPODatasetBuilder, Drop

class Essays(DPODatasetBuilder):
    "Two essays on one question, each with a grade."
    columns = ('question', 'essay_a', 'essay_b', 'grade_a', 'grade_b')

    def row_to_pair(self, row):
        gap = row['grade_a'] - row['grade_b']
        if abs(gap) == 1: raise Drop('grades too close')
        return self.compare(row['question'], row['essay_a'], row['essay_b'], gap)
'''

def test_a_builder_of_ten_lines_is_reached_by_module_and_name(tmp_path, monkeypatch):
    (tmp_path/'essay_builder.py').write_text(BUILDER)
    rows = [dict(question=f'{i}?', essay_a='one', essay_b='two', grade_a=5, grade_b=i % 7) for i in range(70)]
    write(tmp_path/'essays.jsonl', rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    pairs = load_pairs('essay_builder:Essays', dataset_path='essays.jsonl')
    assert pairs.audit.dropped == {'tie': 10, 'grades too close': 20} and len(pairs.train) + len(pairs.test) == 40
    assert len(BUILDER.strip().splitlines()) == 10

def test_a_builder_that_breaks_names_the_row():
    class Broken(DPODatasetBuilder):
        def row_to_pair(self, row): return PreferencePair(row['a'], [], [])
    with pytest.raises(ValueError, match=r"here, row 1: Broken\.row_to_pair fails with KeyError"):
        convert(Broken(), [dict(a=[]), {}], 'here')
    with pytest.raises(ValueError, match='fails with TypeError: prompt of a pair is'):
        convert(Broken(), [dict(a='text')], 'here')
    class Silent(DPODatasetBuilder):
        def row_to_pair(self, row): return None
    assert convert(Silent(), [{}], 'here') == ['row_to_pair gave no pair']

def test_test_pairs_come_from_a_file_a_name_or_a_builder(tmp_path):
    rows = [dict(prompt=f'{i}?', chosen='Yes.', rejected='No.') for i in range(30)]
    train, test = write(tmp_path/'train.jsonl', rows[:20]), write(tmp_path/'test.jsonl', rows[18:])
    pairs = load_pairs(train, test_dataset=test)
    assert (len(pairs.train), len(pairs.test), pairs.audit.overlap) == (20, 12, dict(prompts=2, test_pairs=2))
    assert pairs.test[0].id == 'test:0'
    mapped = load_pairs(train, test_dataset=f'{test}(prompt=prompt)')
    assert content(mapped) == content(pairs) and mapped.audit.test['kept'] == 12
    assert mapped.audit.split == f'all pairs of {test}(prompt=prompt)'
    folder = tmp_path/'folder'
    folder.mkdir()
    write(folder/'train.jsonl', rows[:20]), write(folder/'test.jsonl', rows[20:])
    assert {p.prompt[0]['content'] for p in load_pairs(str(folder)).test} == {r['prompt'] for r in rows[20:]}

# ---- the split, the fingerprint, the audit ----

@given(prompts=st.lists(st.integers(0, 12), min_size=2, max_size=60), fraction=st.floats(0, .9), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_split_by_prompt_shares_no_prompt_and_leaves_something_to_train_on(prompts, fraction, seed):
    made = [replace(PAIR, prompt=[said('user', str(p))]) if p else 'tie' for p in prompts]
    test = take_test(made, fraction, 'prompt', seed)
    rest = [m for i, m in enumerate(made) if i not in set(test) and not isinstance(m, str)]
    held = [made[i] for i in test]
    assert len(set(test)) == len(test) and overlap(rest, held)['prompts'] == 0
    assert rest or not any(prompts)

def test_the_same_file_gives_the_same_split_and_fingerprint_in_another_process():
    path = FIXTURES/'hhh.jsonl'
    code = (f"from dpo_lab.data import *; p = load_pairs({str(path)!r}); "
            "print(data_fingerprint(p.train), data_fingerprint(p.test))")
    envs = [os.environ | {'PYTHONHASHSEED': seed, 'PYTHONPATH': str(ROOT)} for seed in ('1', '2')]
    asked = dict(capture_output=True, text=True, check=True, cwd=ROOT)
    seen = {subprocess.run([sys.executable, '-c', code], env=env, **asked).stdout for env in envs}
    here = load_pairs(str(path))
    assert seen == {f'{data_fingerprint(here.train)} {data_fingerprint(here.test)}\n'}

def test_the_fingerprint_follows_whatever_is_trained_on():
    changes = [dict(prompt=[said('system', 'Q')]), dict(chosen=[said('assistant', 'A ')]), dict(weight=1.),
               dict(soft_label=.5), dict(offset=.5), dict(chosen=PAIR.rejected, rejected=PAIR.chosen)]
    assert len({data_fingerprint([replace(PAIR, **change)]) for change in [{}, *changes]}) == 7
    assert data_fingerprint([replace(PAIR, id=None, strength=None)]) == data_fingerprint([PAIR])

def test_the_audit_counts_what_is_there(tmp_path):
    q = lambda c, r, p='Q?': dict(prompt=p, chosen=c, rejected=r)
    rows = [q('long', 'no'), q('long', 'no'), q('no', 'long'), q('same', 'size'), q('same', 'same'),
            q('abc', 'ab', 'Other?'), q('x', ''), q('ab', 'b', '')]
    audit = load_pairs(write(tmp_path/'r.jsonl', rows), test_fraction=0).audit
    expected = dict(rows=8, kept=6, prompts=3, duplicates=1, sides_swapped=1, equal_text=1, empty_prompts=1)
    assert {k: audit.train[k] for k in expected} == expected
    assert audit.dropped == {'identical completions': 1, 'empty completion': 1}
    assert (audit.train['chosen_longer'], audit.train['longer_wins']) == pytest.approx((4/6, 4.5/6), abs=1e-4)
    assert sum(audit.train['histogram']['chosen']) == 6 and audit.train['characters']['chosen']['p50'] == 3.5
    assert json.loads(json.dumps(audit.to_dict())) == audit.to_dict()

def test_the_audit_prints_in_a_terminal_and_in_a_notebook(tmp_path):
    rows = [dict(prompt=f'<b>{i}</b>?', chosen='Yes, quite.', rejected='No.') for i in range(30)]
    pairs = load_pairs(write(tmp_path/'a<b>.jsonl', rows + [dict(prompt='?', chosen='a', rejected='a')]))
    console = Console(width=110, record=True, file=open(os.devnull, 'w'))
    console.print(pairs.audit)
    shown, page = console.export_text(), pairs._repr_html_()
    for what in ('rows', 'dropped: identical completions', 'accuracy of "longer wins"', 'prompts also in train'):
        assert what in shown
    assert page.count('<svg') == 6 and 'a&lt;b&gt;' in page and '<b>.jsonl' not in page
    assert repr(pairs).startswith('Pairs(') and repr(pairs.audit).startswith('Audit(Columns: 30 of 31 rows kept')

class Letters:
    "A renderer of one character a token, with as many BOS and EOS as asked for."
    name = 'letters'
    class tokenizer: bos_token_id, eos_token_id, get_vocab = 0, 1, staticmethod(lambda: {'<turn>': 2})
    def __init__(self, bos=1, eos=1, stop=('<turn>',)): self.bos, self.eos, self.stop = bos, eos, list(stop)
    def build_generation_prompt(self, messages): return [0]*self.bos + [ord(c) for m in messages for c in m['content']]
    def build_supervised_example(self, messages, train_on_what):
        head = self.build_generation_prompt(messages[:-1])
        last = [ord(c) for c in messages[-1]['content']] + [1]*self.eos
        return head + last + [10], [False]*len(head) + [True]*len(last) + [False]

def test_tokens_are_counted_per_part_and_side():
    def pair(p, c, r):
        return PreferencePair([said('user', 'x'*p)], [said('assistant', 'y'*c)], [said('assistant', 'z'*r)])
    pairs = [pair(5, 3, 9), pair(20, 1, 2)]
    t = token_audit(pairs, Letters(), max_length=14)
    assert t['lengths']['prompt']['p50'] == np.median([6, 21]) and t['lengths']['rejected']['p50'] == np.median([11, 4])
    assert t['truncated'] == dict(chosen=1, rejected=2, either=2, no_room=1)
    assert (t['shared_prompt'], t['two_rows']) == (6+5+11 + 21+3+4, 2*6+5+11 + 2*21+3+4) and t['scored'] == 4+10+2+3
    assert not any(token_audit(pairs, Letters())['truncated'].values())
    assert json.loads(json.dumps(t)) == t
    for n in (0, 1, 2):
        t, expected = token_audit(pairs, Letters(bos=n, eos=2 - n)), [[2, 0, 0], [0, 2, 0], [0, 0, 2]]
        assert t['bos'] == dict(chosen=expected[n], rejected=expected[n])
        assert t['eos'] == dict(chosen=expected[2 - n], rejected=expected[2 - n])

words = st.text(alphabet=st.characters(codec='utf-8', exclude_categories=('Cs',)), max_size=40).map(str.strip).filter(
    lambda s: s and 'Human:' not in s and 'Assistant:' not in s)

@given(turns=st.lists(words, min_size=1, max_size=5).filter(lambda t: len(t) % 2), chosen=words, rejected=words)
@settings(max_examples=150, deadline=None)
def test_a_conversation_survives_the_transcript(turns, chosen, rejected):
    prompt = [said(('user', 'assistant')[i % 2], t) for i, t in enumerate(turns)]
    sides = [prompt + [said('assistant', t)] for t in (chosen, rejected)]
    pair = data.as_pair(None, *map(as_transcript, sides))
    assert text(pair) == text(PreferencePair(prompt, sides[0][-1:], sides[1][-1:]))
    if chosen != rejected: assert text(data.as_pair(None, *sides)) == text(pair)
    else:
        with pytest.raises(Drop, match='identical'): data.as_pair(None, *sides)

# ---- good manners ----

def test_the_module_imports_quickly_and_loading_leaves_logging_alone(tmp_path):
    write(tmp_path/'train.jsonl', [dict(prompt=f'{i}?', chosen='Yes.', rejected='No.') for i in range(20)])
    code = textwrap.dedent(f'''
        import logging, sys
        import dpo_lab.data
        assert not {{'torch', 'transformers', 'datasets', 'pandas', 'rich'}} & set(sys.modules), sorted(sys.modules)
        import datasets
        before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
        print(len(dpo_lab.data.load_pairs({str(tmp_path)!r}).train))
        assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before
        assert logging.getLogger().handlers == []
    ''')
    env = os.environ | {'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1', 'HF_DATASETS_CACHE': str(tmp_path/'cache')}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, '18\n', ''), done.stderr
    assert logging.getLogger('dpo_lab').handlers == []

def test_the_toy_world_ships_with_its_reward():
    if not (ROOT/'dpo_lab'/'assets'/'toy'/'train.jsonl').exists(): pytest.skip('the toy data is not built yet')
    pairs = load_pairs()
    assert pairs.audit.dataset == 'Toy' and len(pairs.train) > 100 and len(pairs.test) > 50
    assert pairs.audit.overlap['prompts'] == 0 and all(p.strength is not None for p in pairs.train)
    assert content(pairs) == content(load_pairs('toy', str(ROOT/'dpo_lab'/'assets'/'toy')))
