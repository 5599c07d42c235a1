-- The best and the worst answer to each prompt become a pair.
--
-- Ties go to the lowest candidate, for the best and for the worst alike. A prompt is set aside, with
-- the reason, when a reward is no number, when no answer is left, and when its best and its worst
-- answer score or read the same. Texts are joined last, so that ranking sorts numbers only.
--
-- $margin_min: the smallest difference of rewards that makes a pair.
-- $truncated: 'drop' leaves answers out that were cut off at max_new_tokens.
with scored as (
    select
        r.prompt_id,
        r.candidate,
        r.reward,
        coalesce(isnan(r.reward) or abs(r.reward) = 'infinity'::float, true) as is_faulty,
        $truncated = 'keep' or c.finish = 'stop' as takes_part
    from {rewards} r
    join {candidates} c on c.prompt_id = r.prompt_id and c.candidate = r.candidate
),
ranked as (
    select
        prompt_id,
        candidate,
        reward,
        row_number() over (partition by prompt_id order by reward desc, candidate) as from_best,
        row_number() over (partition by prompt_id order by reward, candidate) as from_worst
    from scored
    where takes_part
),
extremes as (
    select
        prompt_id,
        max(case when from_best = 1 then candidate end) as chosen_candidate,
        max(case when from_best = 1 then reward end) as chosen_reward,
        max(case when from_worst = 1 then candidate end) as rejected_candidate,
        max(case when from_worst = 1 then reward end) as rejected_reward
    from ranked
    group by prompt_id
),
judged as (
    select prompt_id, bool_or(is_faulty) as is_faulty
    from scored
    group by prompt_id
)
select
    substr(encode(sha256(concat_ws('\n', p.prompt_id, chosen.text, rejected.text)), 'hex'), 1, 32) as row_key,
    p.id,
    p.image,
    p.question as prompt,
    chosen.text as chosen,
    rejected.text as rejected,
    p.prompt_id,
    p.image_ids,
    p.system,
    p.turns,
    e.chosen_candidate,
    e.rejected_candidate,
    e.chosen_reward,
    e.rejected_reward,
    e.chosen_reward - e.rejected_reward as margin,
    chosen.token_ids as chosen_token_ids,
    rejected.token_ids as rejected_token_ids,
    chosen.logp as chosen_logp,
    rejected.logp as rejected_logp,
    chosen.model,
    case when s.is_faulty then 'fault' else 'dropped' end as class,
    case
        when s.is_faulty then 'a reward is not a finite number'
        when e.prompt_id is null then 'every answer was cut off at max_new_tokens'
        when e.chosen_reward = e.rejected_reward then 'the best and the worst answer score the same'
        when chosen.text = rejected.text then 'the best and the worst answer read the same'
        when e.chosen_reward - e.rejected_reward < $margin_min then 'the rewards are closer than margin_min'
    end as reason
from judged s
join {prompts} p on p.prompt_id = s.prompt_id
left join extremes e on e.prompt_id = s.prompt_id
left join {candidates} chosen on chosen.prompt_id = e.prompt_id and chosen.candidate = e.chosen_candidate
left join {candidates} rejected on rejected.prompt_id = e.prompt_id and rejected.candidate = e.rejected_candidate
order by p.prompt_id
