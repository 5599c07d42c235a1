-- The rewards of the k answers to each training prompt: whether they follow the length of the
-- answers. Within prompts, both are differences from the mean of the prompt, so that questions with
-- long answers and high rewards do not count.
with rewarded as (
  select r.prompt_id, cast(r.reward as double) as reward, cast(cardinality(a.token_ids) as double) as tokens
  from {rewards} r
  join {answers} a on a.round = r.round and a.prompt_id = r.prompt_id and a.candidate = r.candidate
  where r.round = $round
), per_prompt as (
  select count(*) as k, sum(reward * tokens) - sum(reward) * sum(tokens) / count(*) as both_ways,
         sum(reward * reward) - sum(reward) * sum(reward) / count(*) as rewards,
         sum(tokens * tokens) - sum(tokens) * sum(tokens) / count(*) as lengths
  from rewarded group by prompt_id
)
select 'reward' as metric, avg(reward) as value, count(*) as n from rewarded
union all
select 'length_correlation', corr(reward, tokens), count(*) from rewarded
union all
select 'length_correlation_within', sum(both_ways) / nullif(sqrt(sum(rewards) * sum(lengths)), 0), coalesce(sum(k), 0) from per_prompt
