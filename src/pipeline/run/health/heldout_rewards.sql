-- The rewards of the answers to the held-out prompts, and the gains over round 0 and over the round
-- before. A gain is the mean over prompts, which are paired with themselves. Prompts about the same
-- image or video are one cluster: with G clusters, n prompts of gain d, and g the sum of d - mean(d) over a
-- cluster, the standard error is sqrt(G / (G - 1) * sum(g^2)) / n. The interval takes the quantile of
-- t(G - 1), by its expansion at the normal one; fewer than ten clusters have none.
with rewarded as (
  select round, prompt_id, avg(cast(reward as double)) as reward from {rewards}
  where round in (0, $round - 1, $round) group by round, prompt_id
), compared as (
  select 'heldout_gain' as metric, a.prompt_id, a.reward - b.reward as gain
  from rewarded a join rewarded b on b.prompt_id = a.prompt_id
  where a.round = $round and b.round = 0 and $round > 0
  union all
  select 'heldout_step', a.prompt_id, a.reward - b.reward
  from rewarded a join rewarded b on b.prompt_id = a.prompt_id
  where a.round = $round and b.round = $round - 1
), mean as (
  select metric, avg(gain) as value, count(*) as n from compared group by metric
), clusters as (
  select c.metric, coalesce(p.image_ids[1], p.videos[1]['video_id'], c.prompt_id) as image, sum(c.gain - m.value) as g
  from compared c
  join mean m on m.metric = c.metric
  join {prompts} p on p.prompt_id = c.prompt_id
  group by c.metric, coalesce(p.image_ids[1], p.videos[1]['video_id'], c.prompt_id)
), spread as (
  select metric, count(*) as many, cast(count(*) - 1 as double) as df, sum(g * g) as squares
  from clusters group by metric
), ranged as (
  select m.metric, m.value, m.n, case when s.many >= 10 then
      sqrt(s.many / s.df * s.squares) / m.n
      * (1.959964 + 2.372271 / s.df + 2.822499 / (s.df * s.df)) end as reach
  from mean m join spread s on s.metric = m.metric
)
select 'heldout_reward' as metric, avg(reward) as value, count(*) as n, cast(null as double) as low, cast(null as double) as high
from rewarded where round = $round
union all
select metric, value, n, value - reach, value + reach from ranged
