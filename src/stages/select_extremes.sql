-- Which answer to each prompt is the best, and which the worst.
--
-- Ties go to the lowest candidate, for the best and for the worst alike. A prompt is set aside, with
-- the reason, when a reward is no number, when no answer is left, and when its best and its worst
-- answer score or read the same. Texts take part as digests: only numbers are joined and sorted.
--
-- $margin_min: the smallest difference of rewards that makes a pair.
-- $truncated: 'drop' leaves answers out that were cut off at max_new_tokens.
with scored as (
    select
        r.prompt_id,
        r.candidate,
        r.reward,
        c.text_digest,
        coalesce(isnan(r.reward) or abs(r.reward) = 'infinity'::float, true) as is_faulty,
        $truncated = 'keep' or c.finish = 'stop' as takes_part
    from {rewards} r
    join (select prompt_id, candidate, finish, md5(text) as text_digest from {candidates}) c
        on c.prompt_id = r.prompt_id and c.candidate = r.candidate
),
ranked as (
    select
        prompt_id,
        candidate,
        reward,
        text_digest,
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
        max(case when from_best = 1 then text_digest end) as chosen_digest,
        max(case when from_worst = 1 then candidate end) as rejected_candidate,
        max(case when from_worst = 1 then reward end) as rejected_reward,
        max(case when from_worst = 1 then text_digest end) as rejected_digest
    from ranked
    group by prompt_id
),
judged as (
    select prompt_id, bool_or(is_faulty) as is_faulty
    from scored
    group by prompt_id
)
select
    j.prompt_id,
    e.chosen_candidate,
    e.rejected_candidate,
    e.chosen_reward,
    e.rejected_reward,
    e.chosen_reward - e.rejected_reward as margin,
    case when j.is_faulty then 'fault' else 'dropped' end as class,
    case
        when j.is_faulty then 'a reward is not a finite number'
        when e.prompt_id is null then 'every answer was cut off at max_new_tokens'
        when e.chosen_reward = e.rejected_reward then 'the best and the worst answer score the same'
        when e.chosen_digest = e.rejected_digest then 'the best and the worst answer read the same'
        when e.chosen_reward - e.rejected_reward < $margin_min then 'the rewards are closer than margin_min'
    end as reason
from judged j
left join extremes e on e.prompt_id = j.prompt_id
