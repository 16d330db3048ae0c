"Judges, pairs, and rounds of on-policy preferences."
import json
import shlex
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from dpo_lab.data import load_pairs
from dpo_lab.models import tiny_model
from dpo_lab.onpolicy import (
    Compares,
    Endpoint,
    OnPolicyConfig,
    asked_pause,
    choose_pairs,
    find_judge,
    judge_all,
    load_prompts,
    main,
    reward_judge,
    run_onpolicy,
)
from dpo_lab.toy import toy_reward

ASK = [dict(role='user', content='How was the film?')]


def quiet(line): pass


@pytest.fixture
def server():
    "An OpenAI-compatible server on this machine: it does what the list `plan` says, then replies `reply`."
    class Handler(BaseHTTPRequestHandler):
        plan, reply, asked, headers_seen, retry_after = [], {}, [], [], ''
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            Handler.asked.append((self.path, body)); Handler.headers_seen.append(dict(self.headers))
            step = Handler.plan.pop(0) if Handler.plan else 200
            if step == 'slow': time.sleep(1.); return
            if step == 'drop': self.connection.close(); return
            reply = Handler.reply(body) if callable(Handler.reply) else Handler.reply
            data = json.dumps(reply).encode()
            self.send_response(step); self.send_header('Content-Length', str(len(data)))
            if Handler.retry_after and step != 200: self.send_header('Retry-After', Handler.retry_after)
            self.end_headers(); self.wfile.write(data)
        def log_message(self, *args): pass
    running = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    Handler.url = f'http://127.0.0.1:{running.server_port}/v1'
    yield Handler
    running.shutdown()


def says(text): return dict(choices=[dict(message=dict(content=text))])


def endpoint(server, tmp_path, **more):
    return Endpoint(server.url, 'judge', cache=str(tmp_path/'cache.jsonl'), pause=.01, **more)


@pytest.mark.parametrize('plan', [[503, 429], ['drop'], ['slow', 500]])
def test_a_request_that_fails_for_a_passing_reason_is_tried_again(server, tmp_path, plan):
    server.plan, server.reply = list(plan), says('A')
    judge = endpoint(server, tmp_path, timeout=.3)
    assert judge(ASK, ['one', 'two']) == [.5, .5]
    assert judge.report()['retried'] == len(plan) and judge.report()['position_bias'] == .5
    assert server.asked[0][0] == '/v1/chat/completions'


@pytest.mark.parametrize('reply', [dict(error='out of credit'), dict(choices=[]), dict(choices=[{}]), ['A'], 'A'])
def test_a_reply_without_choices_is_told_and_not_kept(server, tmp_path, reply):
    server.reply = reply
    with pytest.raises(ValueError, match='holds no choices.*OpenAI-compatible'):
        endpoint(server, tmp_path)(ASK, ['one', 'two'])
    assert len(server.asked) == 1 and not (tmp_path/'cache.jsonl').exists()


def test_the_pause_a_server_asks_for_is_kept(server, tmp_path):
    server.plan, server.reply, server.retry_after = [429], says('A'), '0.6'
    begun = time.monotonic()
    assert endpoint(server, tmp_path)(ASK, ['one', 'two']) == [.5, .5]
    assert .6 <= time.monotonic() - begun < 5
    server.plan, server.retry_after = [503], formatdate(time.time() + 4000, usegmt=True)
    with pytest.raises(OSError, match=r'come back in (39|40)\d\d seconds'):
        endpoint(server, tmp_path)(ASK, ['one', 'three'])
    assert [asked_pause(h) for h in ('', 'soon', '-3', formatdate(0))] == [0.]*4


def test_one_question_of_two_workers_is_asked_once(server, tmp_path):
    def slowly(body): time.sleep(.2); return says('A')
    server.reply = slowly
    judge = endpoint(server, tmp_path)
    assert judge_all(judge, [ASK]*6, [['one', 'two']]*6) == [[.5, .5]]*6
    assert len(server.asked) == 2 and judge.report()['from_cache'] == 10


def test_a_refusal_is_not_tried_again(server, tmp_path):
    server.plan = [401]
    with pytest.raises(ValueError, match='status 401'): endpoint(server, tmp_path)(ASK, ['one', 'two'])
    assert len(server.asked) == 1


def test_a_server_that_never_answers_is_given_up(server, tmp_path):
    server.plan = [500]*9
    with pytest.raises(OSError, match='3 tries'): endpoint(server, tmp_path, retries=2)(ASK, ['one', 'two'])
    assert len(server.asked) == 3


def test_nothing_is_paid_twice(server, tmp_path):
    server.reply = lambda body: says('A' if body['messages'][0]['content'].index('one') < 300 else 'B')
    first = endpoint(server, tmp_path)
    scores, n = first(ASK, ['one', 'two', 'three']), len(server.asked)
    assert n == 6 and first.report()['asked'] == 6
    again = endpoint(server, tmp_path)
    assert again(ASK, ['one', 'two', 'three']) == scores and len(server.asked) == n
    assert again.report()['from_cache'] == 6 and again.report()['asked'] == 0
    endpoint(server, tmp_path)([*ASK, *ASK], ['one', 'two'])
    assert len(server.asked) == n + 2       # another prompt is another question


def test_letters_are_read_from_log_probs_where_there_are_some(server, tmp_path):
    top = [dict(token=' B', logprob=-.1), dict(token='A', logprob=-2.4), dict(token='a', logprob=-9.)]
    server.reply = dict(choices=[dict(message=dict(content='B'), logprobs=dict(content=[dict(top_logprobs=top)]))])
    judge = endpoint(server, tmp_path)
    judge(ASK, ['one', 'two'])
    chance = torch.tensor([-2.4, -9.]).exp().sum()
    assert judge.seen[0][0] == pytest.approx((chance/(chance + torch.tensor(-.1).exp())).item(), abs=1e-6)


def test_a_judge_that_does_not_choose_is_refused_and_not_kept(server, tmp_path):
    server.reply = says('Both are fine.')
    with pytest.raises(ValueError, match='instead of A or B'): endpoint(server, tmp_path)(ASK, ['one', 'two'])
    assert not (tmp_path/'cache.jsonl').exists()


def test_the_key_comes_from_the_environment_and_stays_out_of_files(server, tmp_path, monkeypatch):
    monkeypatch.setenv('JUDGE_KEY', 'not-a-real-key')
    server.reply = says('A')
    endpoint(server, tmp_path, key_variable='JUDGE_KEY')(ASK, ['one', 'two'])
    assert server.headers_seen[0]['Authorization'] == 'Bearer not-a-real-key'
    assert 'not-a-real-key' not in (tmp_path/'cache.jsonl').read_text()


def test_prompts_are_judged_side_by_side_and_stay_in_order(server, tmp_path):
    server.reply = says('A')
    judge = endpoint(server, tmp_path)
    prompts = [[dict(role='user', content=str(i))] for i in range(20)]
    assert judge_all(judge, prompts, [['x', 'y']]*20) == [[.5, .5]]*20
    by_length = find_judge('longest')
    by_length.workers = 4
    assert judge_all(by_length, prompts, [['x'*i, 'y'] for i in range(20)]) == [[i, 1] for i in range(20)]


def test_scores_of_a_comparing_judge_hold_no_position():
    letters = Compares('second', lambda asked: [.2]*len(asked))
    assert letters(ASK, ['a', 'b']) == pytest.approx([.5, .5])
    assert letters.report() == dict(comparisons=1, position_bias=-.3, order_decides=1.)
    fair = Compares('good', lambda asked: [float('[Answer A]\ngood' in q[0]['content']) for q in asked])
    assert fair(ASK, ['bad', 'good', 'worse']) == pytest.approx([.25, 1., .25])
    assert fair(ASK, ['alone']) == [0.]


def test_a_local_model_judges(tmp_path):
    judge = find_judge('local(model=tiny)')
    scores = judge(ASK, ['The plot was superb.', 'The plot was awful.', 'x'])
    assert sum(scores) == pytest.approx(1.5) and judge.report()['comparisons'] == 3
    assert judge(ASK, ['The plot was superb.', 'The plot was awful.', 'x']) == scores


def test_a_reward_model_judges(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification
    tokenizer = tiny_model()[1]
    def save(labels, template):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, num_labels=labels, pad_token_id=tokenizer.pad_token_id)
        folder = tmp_path/f'{labels}{bool(template)}'
        LlamaForSequenceClassification(config).save_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return str(folder)
    said = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    one, two = find_judge(f"reward(model='{save(1, said)}')")(ASK, ['The plot was superb.', 'x'])
    assert one != two
    with pytest.raises(ValueError, match='2 outputs'): reward_judge(save(2, said))
    with pytest.raises(ValueError, match='no chat template'): reward_judge(save(1, None))


@pytest.mark.parametrize('spec, says', [
    ('longst', 'longest'),
    ('json:nothing', "judge 'json:nothing': json has no 'nothing'"), ('math:pi', 'must be a function of a prompt'),
    ('no_such_module_here:f', 'cannot import'),
    ('lexicon', 'has no word'), ('lexicon(good=x)', "has good='x'"),
    ('endpoint(url=http://x)', 'model'), ('shortest(x=1)', 'x')])
def test_a_judge_that_is_not_there_is_named(spec, says):
    with pytest.raises(ValueError, match=says): find_judge(spec)


def test_your_own_function_judges(tmp_path, monkeypatch):
    (tmp_path/'my_judge_module.py').write_text('def words(prompt, answer): return len(answer.split())\n'
                                               'def broken(prompt, answer): return float("nan")\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert find_judge('my_judge_module:words')(ASK, ['one two', 'one']) == [2, 1]
    with pytest.raises(ValueError, match='finite'): find_judge('my_judge_module:broken')(ASK, ['one two'])


def test_pairs_leave_out_and_count_duplicates_and_ties():
    texts, scores = ['a', 'b', 'b', 'c', ' '], [1., 1., 1., 4., 9.]
    assert choose_pairs(texts, scores, 'all_pairs') == (
        [(3, 0), (3, 1)], dict(duplicates=1, ties=1, empty=3))
    assert choose_pairs(texts[:4], scores[:4]) == ([(3, 1)], dict(duplicates=1, ties=0, empty=0))
    assert choose_pairs(texts[:4], scores[:4], margin=3.)[1]['ties'] == 1
    assert choose_pairs(['a', 'a'], [1, 1]) == ([], dict(duplicates=1, ties=0, empty=0))
    with pytest.raises(ValueError, match="Did you mean 'all_pairs'"): choose_pairs(texts, scores, 'all_pair')


@pytest.mark.parametrize('rows, n', [
    ([dict(prompt=f'{i}?') for i in range(12)], 12),
    ([dict(messages=[*ASK, dict(role='assistant', content=f'{i}')]) for i in range(12)], 1),
    ([dict(prompt=f'{i}?', chosen='x', rejected='y') for i in range(12)], 12)])
def test_prompts_come_from_any_set(tmp_path, rows, n):
    path = tmp_path/'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    pairs = load_prompts(str(path))
    assert len({json.dumps(p.prompt) for p in pairs.train + pairs.test}) == n
    assert all(p.prompt[-1]['role'] == 'user' for p in pairs.train)


@pytest.fixture(scope='module')
def rounds(tmp_path_factory):
    config = OnPolicyConfig(log_path=str(tmp_path_factory.mktemp('on')/'policy'), rounds=2, k=6, num_prompts=24,
                            max_new_tokens=32, batch_size=8, num_epochs=6, eval_every=0, learning_rate=1e-3)
    seen = []
    for r in run_onpolicy(config, quiet):
        seen.append((r, [dict(m) for m in r.experiment]))
    return config, seen


def test_a_round_is_a_preference_set_of_the_models_own_answers(rounds):
    config, seen = rounds
    r = seen[0][0]
    answers = [json.loads(line) for line in (r.path/'answers.jsonl').read_text().splitlines()]
    assert len(answers) == 24*6 and r.facts['answers'] == 24*6
    texts = {a['answer'] for a in answers}
    pairs = load_pairs(str(r.pairs), test_fraction=0)
    assert pairs.audit.kept == r.facts['pairs'] and not pairs.audit.dropped
    for p in pairs.train:
        assert p.chosen[0]['content'] in texts and p.rejected[0]['content'] in texts
        assert toy_reward(p.chosen[0]['content']) - toy_reward(p.rejected[0]['content']) == pytest.approx(p.strength)
    assert r.facts['pairs'] + r.facts['ties'] + r.facts['empty'] <= 24


def test_rounds_raise_the_reward_and_share_held_out_pairs(rounds):
    _, seen = rounds
    assert seen[1][0].facts['mean_score'] > seen[0][0].facts['mean_score'] + .3
    assert {r.run.config['test_dataset'] for r, _ in seen} == {str(seen[0][0].path.parent/'held_out.jsonl')}
    assert {m[-1]['test/num_pairs'] for _, m in seen} == {200}


def test_a_kept_reference_is_the_model_it_all_began_with(rounds):
    _, seen = rounds
    first, second = (r.run.config for r, _ in seen)
    same = lambda c: c['reference_fingerprint'].split('-')[0]
    assert same(first) == same(second) and second['load_checkpoint_path'] == str(seen[0][0].final)
    assert seen[1][1][0]['kl'] > 0      # the second round begins where the first ended, away from its reference


def test_rounds_that_are_done_are_not_done_again(rounds):
    import chz
    config, seen = rounds
    before = {r.pairs: r.pairs.stat().st_mtime_ns for r, _ in seen}
    again = list(run_onpolicy(chz.replace(config, behavior_if_log_dir_exists='resume'), quiet))
    assert [r.experiment for r in again] == [None, None] and [r.facts for r in again] == [r.facts for r, _ in seen]
    assert {r.pairs: r.pairs.stat().st_mtime_ns for r in again} == before
    with pytest.raises(ValueError, match='judge .was'):
        run_onpolicy(chz.replace(config, behavior_if_log_dir_exists='resume', judge='longest'), quiet)


def test_a_moved_reference_is_the_model_that_wrote_the_answers(tmp_path):
    config = OnPolicyConfig(log_path=str(tmp_path/'r'), rounds=2, k=4, num_prompts=16, max_new_tokens=32, batch_size=8,
                            num_epochs=1, reference='moved', eval_every=0)
    starts = [[m for m in r.experiment][0] for r in run_onpolicy(config, quiet)]
    assert [m['kl'] for m in starts] == pytest.approx([0, 0], abs=1e-6)


def test_a_round_that_is_not_trained_holds_up_the_next(tmp_path):
    config = OnPolicyConfig(log_path=str(tmp_path/'r'), rounds=2, num_prompts=16, max_new_tokens=32, batch_size=8)
    with pytest.raises(ValueError, match='not trained'): list(run_onpolicy(config, quiet))


def test_a_judge_that_finds_no_difference_stops_the_round(tmp_path):
    config = OnPolicyConfig(log_path=str(tmp_path/'r'), judge='lexicon(zebra=1)', num_prompts=8, max_new_tokens=32,
                            batch_size=8)
    with pytest.raises(ValueError, match='0 pairs.*8 ties'): list(run_onpolicy(config, quiet))


def test_the_command_runs_a_round_and_answers_mistakes_in_a_sentence(tmp_path, capsys):
    words = [f'log_path={tmp_path}/r', 'num_prompts=12', 'k=4', 'max_new_tokens=32', 'batch_size=6', 'num_epochs=1']
    assert main([*words, 'judge=longest']) == 0
    assert Path(tmp_path/'r'/'round1'/'dpo'/'final').exists()
    assert 'mean score' in capsys.readouterr().out
    assert main(['judge=longst', f'log_path={tmp_path}/other']) == 2
    assert "Did you mean 'longest'" in capsys.readouterr().err
    assert main(['jugde=toy']) == 2 and not (tmp_path/'other').exists()


@pytest.mark.parametrize('words, says', [
    ('num_prompts=4 batch_size=8', 'at most 4 pairs by best_worst'), ('max_new_tokens=0', 'max_new_tokens=0'),
    ('num_prompts=2 k=3 pairing=all_pairs batch_size=8', 'at most 6 pairs by all_pairs'), ('top_p=0', 'top_p=0.0'),
    ('top_k=-1', 'top_k=-1')])
def test_what_cannot_make_a_round_is_said_before_any_answer(words, says, tmp_path, capsys):
    assert main([f'log_path={tmp_path}/r', *words.split()]) == 2
    assert says in capsys.readouterr().err and not (tmp_path/'r'/'config.json').exists()


def test_a_judge_that_does_not_answer_stops_rounds_that_can_be_continued(server, tmp_path, capsys):
    server.reply, server.plan = says('A'), [200, 500]
    judge = f'judge=endpoint(url={server.url},model=m,cache={tmp_path}/judge.jsonl,retries=0,workers=1)'
    words = [f'log_path={tmp_path}/r', 'num_prompts=2', 'k=2', 'max_new_tokens=32', 'batch_size=1', 'max_steps=1',
             judge]
    assert main(words) == 2
    out, err = capsys.readouterr()
    line = next(line for line in out.splitlines() if 'behavior_if_log_dir_exists=resume' in line)
    again = shlex.split(line)
    assert 'did not answer in 1 tries' in err and again[:3] == ['python', '-m', 'dpo_lab.onpolicy'] and judge in again
    server.reply, n = (lambda body: says('A' if len(server.asked) % 2 else 'B')), len(server.asked)
    assert main(again[3:]) == 0 and len(server.asked) == n + 3      # of four questions, one was answered before
